package e2e

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"time"
)

// dubboCall asks a provider at address for demo.api.Greeter.greet(name) of a group and version, in Dubbo's own protocol
// (https://dubbo.apache.org/en/overview/reference/protocols/tcp/: a header of 16 bytes, and a body in Hessian 2), and returns
// what it says.
func dubboCall(address, group, version, name string) (string, error) {
	conn, err := net.DialTimeout("tcp", address, 3*time.Second)
	if err != nil {
		return "", err
	}
	defer conn.Close() // all is said
	if err := conn.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		return "", err
	}
	const path = "demo.api.Greeter"
	var body bytes.Buffer
	for _, s := range []string{"2.0.2", path, version, "greet", "Ljava/lang/String;", name} {
		hessianString(&body, s)
	}
	body.WriteByte('H') // an untyped map: the attachments
	for _, kv := range [][2]string{{"path", path}, {"interface", path}, {"group", group}, {"version", version}} {
		if kv[1] != "" {
			hessianString(&body, kv[0])
			hessianString(&body, kv[1])
		}
	}
	body.WriteByte('Z')
	request := []byte{0xda, 0xbb, 0xc2, 0} // magic; a request that wants an answer, in Hessian 2; no status
	request = binary.BigEndian.AppendUint64(request, 1)
	request = binary.BigEndian.AppendUint32(request, uint32(body.Len()))
	if _, err := conn.Write(append(request, body.Bytes()...)); err != nil {
		return "", err
	}
	header := make([]byte, 16)
	if _, err := io.ReadFull(conn, header); err != nil {
		return "", fmt.Errorf("read the answer's header: %w", err)
	}
	answer := make([]byte, min(binary.BigEndian.Uint32(header[12:]), 1<<20))
	if _, err := io.ReadFull(conn, answer); err != nil {
		return "", fmt.Errorf("read the answer: %w", err)
	}
	const ok, value, valueAndAttachments = 20, 0x91, 0x94
	if header[3] != ok || len(answer) < 2 || answer[0] != value && answer[0] != valueAndAttachments || answer[1] >= 32 ||
		len(answer) < 2+int(answer[1]) {
		return "", fmt.Errorf("the provider answers with status %d: %.300q", header[3], answer)
	}
	return string(answer[2 : 2+answer[1]]), nil
}

// hessianString writes a string of up to 1023 ASCII letters.
func hessianString(b *bytes.Buffer, s string) {
	if len(s) < 32 {
		b.WriteByte(byte(len(s)))
	} else {
		b.Write([]byte{0x30 + byte(len(s)>>8), byte(len(s))})
	}
	b.WriteString(s)
}
