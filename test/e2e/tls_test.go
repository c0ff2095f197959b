package e2e

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	auth "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secrets "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/regbridge/regbridge/test/harness"
)

// sdsServer gives proxies their Secrets.
type sdsServer struct {
	secrets.UnimplementedSecretDiscoveryServiceServer
	secrets []*auth.Secret
}

// StreamSecrets answers the first request, which names one Secret; the others of the stream acknowledge it.
func (s *sdsServer) StreamSecrets(stream secrets.SecretDiscoveryService_StreamSecretsServer) error {
	r, err := stream.Recv()
	if err != nil {
		return err
	}
	i := slices.IndexFunc(s.secrets, func(secret *auth.Secret) bool { return slices.Contains(r.ResourceNames, secret.Name) })
	if i < 0 {
		return fmt.Errorf("asked for %v, which is not here", r.ResourceNames)
	}
	packed, err := anypb.New(s.secrets[i])
	if err != nil {
		return err
	}
	answer := &discovery.DiscoveryResponse{TypeUrl: r.TypeUrl, VersionInfo: "1", Nonce: "1", Resources: []*anypb.Any{packed}}
	if err := stream.Send(answer); err != nil {
		return err
	}
	for {
		if _, err := stream.Recv(); err != nil {
			return err
		}
	}
}

// startSDS serves a CA under the names by which istiod has proxies ask for the CAs of their machine and of the mesh, and a
// certificate of it as the workload's. In production that is the work of the agent beside Istio's proxy.
func startSDS(t *testing.T, ca *harness.CA) (address string) {
	t.Helper()
	l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", harness.FreePort(t)))
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	inline := func(pem string) *core.DataSource {
		return &core.DataSource{Specifier: &core.DataSource_InlineString{InlineString: pem}}
	}
	trusted := &auth.Secret_ValidationContext{ValidationContext: &auth.CertificateValidationContext{TrustedCa: inline(ca.PEM)}}
	certPEM, keyPEM := ca.Issue(t, "workload")
	secrets.RegisterSecretDiscoveryServiceServer(s, &sdsServer{secrets: []*auth.Secret{
		{Name: "file-root:system", Type: trusted},
		{Name: "ROOTCA", Type: trusted},
		{Name: "default", Type: &auth.Secret_TlsCertificate{TlsCertificate: &auth.TlsCertificate{
			CertificateChain: inline(certPEM), PrivateKey: inline(keyPEM),
		}}},
	}})
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	t.Cleanup(func() {
		s.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return l.Addr().String()
}

// TestTLSUpstream has services in Consul that say that they speak HTTPS. The sidecar begins the TLS, and verifies.
func TestTLSUpstream(t *testing.T) {
	t.Parallel()
	ca, strangers := harness.NewCA(t, "upstreams"), harness.NewCA(t, "strangers")
	w := newWorld(t)
	w.startConsul(t, harness.ConsulOptions{}, "")
	w.startMesh(t, harness.IstiodOptions{}, harness.SidecarOptions{Delta: true, SDS: startSDS(t, ca)})
	start := func(service string, config *tls.Config) *harness.Upstream {
		o := w.upstreamOptions(service + "-1")
		o.TLS = config
		o.Handler = http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
			if r.TLS == nil || r.TLS.ServerName != inConsul(service) {
				http.Error(rw, "the client did not ask for "+inConsul(service), http.StatusMisdirectedRequest)
				return
			}
			_, _ = rw.Write([]byte(o.Name))
		})
		u := harness.StartUpstream(t, o)
		r := instance(service, u)
		r.Meta = map[string]string{"protocol": "https"}
		w.consul.Register(r)
		return u
	}
	plain := w.start(t, "plain", "plain-1")
	secure := start("secure", ca.ServerTLS(t, inConsul("secure")))
	refused := map[string]*harness.Upstream{ // by the counter of Envoy that tells why
		"fail_verify_san":   start("wrong-name", ca.ServerTLS(t, inConsul("another"))),
		"fail_verify_error": start("wrong-ca", strangers.ServerTLS(t, inConsul("wrong-ca"))),
	}
	w.serves(t, inConsul("plain"), plain)
	w.serves(t, inConsul("secure"), secure)
	for counter, u := range refused {
		host := inConsul(strings.TrimSuffix(u.Name, "-1"))
		harness.Eventually(t, patience, func() error {
			name, err := w.ask(host)
			var e *statusError
			if !errors.As(err, &e) || e.status != http.StatusServiceUnavailable || unavailable(err) {
				return fmt.Errorf("%s is answered by %q, want a failed connection; error: %w", host, name, err)
			}
			stats, err := w.envoy.Stats(regexp.QuoteMeta(host) + `.*\.ssl\.` + counter + "$")
			if err != nil {
				return err
			}
			for _, n := range stats {
				if n > 0 {
					return nil
				}
			}
			return fmt.Errorf("Envoy did not count %s for %s: %v", counter, host, stats)
		})
		if n := u.Requests(); n > 0 {
			t.Errorf("%s got %d requests in spite of its certificate", u.Name, n)
		}
	}
	configs, err := w.istiod.Configz()
	if err != nil {
		t.Fatal(err)
	}
	rules := map[string]bool{}
	for _, c := range configs {
		if c.Kind == "DestinationRule" {
			rules[c.Metadata.Name] = true
		}
	}
	if len(rules) != 3 || !rules[inConsul("secure")] {
		t.Errorf("istiod has the DestinationRules %v, want one for each HTTPS service", rules)
	}
	w.consul.Deregister("secure-1")
	w.serves503(t, inConsul("secure"))
	w.consul.Register(func() registration {
		r := instance("secure", secure)
		r.Meta = map[string]string{"protocol": "https"}
		return r
	}())
	w.serves(t, inConsul("secure"), secure)
}

// TestTLSToIstiod has istiod read by TLS, with the CA in its mesh configuration.
func TestTLSToIstiod(t *testing.T) {
	t.Parallel()
	ca := harness.NewCA(t, "bridges")
	dir := t.TempDir()
	const name = "regbridge.test"
	ca.WriteFiles(t, dir, name)
	w := newWorld(t)
	u, other := w.upstream(t, "web-1"), w.upstream(t, "web-2")
	w.startBridge(t, harness.RegbridgeOptions{
		Config: map[string]string{"a.yaml": mcpBridge("a", w.staticEntry("web", u))},
		Args:   []string{"--xds-tls-cert", filepath.Join(dir, "tls.crt"), "--xds-tls-key", filepath.Join(dir, "tls.key")},
	})
	source := harness.MCPSource{Address: w.bridge.XDS, CA: ca.PEM, SNI: name}
	w.startMesh(t, harness.IstiodOptions{Sources: []harness.MCPSource{source}}, harness.SidecarOptions{})
	w.serves(t, "web.static", u)

	serial := func() string {
		conn, err := tls.Dial("tcp", w.bridge.XDS, &tls.Config{
			RootCAs: ca.Pool(), ServerName: name, NextProtos: []string{"h2"}, MinVersion: tls.VersionTLS12,
		})
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		return conn.ConnectionState().PeerCertificates[0].SerialNumber.String()
	}
	before := serial()
	ca.WriteFiles(t, dir, name)
	harness.Eventually(t, patience, func() error {
		if serial() == before {
			return errors.New("the old certificate is still shown")
		}
		return nil
	})
	w.bridge.WriteConfig("a.yaml", mcpBridge("a", w.staticEntry("web", u, other))) // the stream goes on
	w.serves(t, "web.static", u, other)
	w.istiod.Restart() // and a new one begins
	w.serves(t, "web.static", u, other)
}
