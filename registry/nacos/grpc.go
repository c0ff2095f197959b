package nacos

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"sync/atomic"
	"time"

	pb "github.com/nacos-group/nacos-sdk-go/v2/api/grpc"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/regbridge/regbridge/registry"
)

// connection is a client's connection to one server of Nacos 2 or 3, over which the server also sends requests: pushes,
// and questions whether we are alive. The messages are JSON in a protobuf envelope; their fields are those of Nacos's own
// clients. Only the envelope is taken from the Go client: the rest of it reads the environment, logs and writes files by
// itself, takes no context, ends the process over a bad certificate, and turns refused requests into empty answers.
type connection struct {
	settings *settings
	server   registry.Server
	auth     *auth
	conn     *grpc.ClientConn
	stream   pb.BiRequestStream_RequestBiStreamClient
	dialed   atomic.Bool
	local    atomic.Pointer[string] // our address, which the server shows as the client's
}

// The types of messages, see alibaba/nacos, packages com.alibaba.nacos.api.remote and com.alibaba.nacos.api.naming.remote.
const (
	typeServerCheck     = "ServerCheckRequest"
	typeSetup           = "ConnectionSetupRequest"
	typeHealthCheck     = "HealthCheckRequest"
	typeServiceList     = "ServiceListRequest"
	typeSubscribe       = "SubscribeServiceRequest"
	typePush            = "NotifySubscriberRequest"
	typeClientDetection = "ClientDetectionRequest"
	typeConnectReset    = "ConnectResetRequest"
	typeSetupAck        = "SetupAckRequest"
)

// errNotReady is wrapped by answers with a code from 300 to 399: the server starts, or does not know the connection.
var errNotReady = errors.New("the server is not ready for this connection")

// answer is what all answers have in common.
type answer struct {
	ResultCode int    `json:"resultCode"`
	ErrorCode  int    `json:"errorCode"`
	Success    bool   `json:"success"`
	Message    string `json:"message"`
}

func (a *answer) result() *answer { return a }

// anyAnswer is an answer of some type, or an ErrorResponse.
type anyAnswer interface{ result() *answer }

// naming begins requests about services.
type naming struct {
	Namespace   string `json:"namespace"`
	GroupName   string `json:"groupName"`
	ServiceName string `json:"serviceName"`
	Module      string `json:"module"`
}

// connect reaches a server, and waits until it takes requests.
func connect(ctx context.Context, s *settings, server registry.Server, auth *auth) (*connection, error) {
	c := &connection{settings: s, server: server, auth: auth}
	config, err := s.env.ClientTLS()
	if err != nil {
		return nil, fmt.Errorf("prepare TLS to nacos: %w", err)
	}
	creds := insecure.NewCredentials()
	if config != nil {
		config.ServerName = cmp.Or(config.ServerName, server.Host)
		creds = credentials.NewTLS(config)
	}
	address := net.JoinHostPort(server.Host, strconv.Itoa(int(server.Port)+grpcOffset))
	c.conn, err = grpc.NewClient("passthrough:///"+url.PathEscape(address),
		grpc.WithTransportCredentials(creds),
		grpc.WithDisableServiceConfig(),
		grpc.WithContextDialer(c.dial), // which also keeps the environment's proxies out
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxAnswer)),
		grpc.WithUserAgent("regbridge"),
	)
	if err != nil {
		return nil, fmt.Errorf("connect to nacos at %s: %w", address, err)
	}
	if err := c.setUp(ctx); err != nil {
		c.close()
		return nil, fmt.Errorf("connect to nacos at %s (gRPC, the HTTP port + %d; a 1.x server has none and needs type nacos): %w",
			address, grpcOffset, err)
	}
	return c, nil
}

// dial connects once: on a second network connection the server would not know us, and nobody would know of the gap.
func (c *connection) dial(ctx context.Context, address string) (net.Conn, error) {
	if c.dialed.Swap(true) {
		return nil, errors.New("the connection was lost")
	}
	conn, err := (&net.Dialer{Timeout: dialTimeout}).DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	if tcp, ok := conn.LocalAddr().(*net.TCPAddr); ok {
		ip := tcp.IP.String()
		c.local.Store(&ip)
	}
	return conn, nil
}

// close ends the connection, and receive with it.
func (c *connection) close() { c.conn.Close() } //nolint:errcheck // nothing is lost

// setUp introduces us to the server, as a client that wants to hear of services.
func (c *connection) setUp(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 2*c.settings.timeout)
	defer cancel()
	if err := c.ready(ctx, typeServerCheck); err != nil {
		return err
	}
	lasting, end := context.WithCancel(context.WithoutCancel(ctx)) // until close
	defer context.AfterFunc(ctx, end)()                            // but setting it up takes no longer than ctx
	stream, err := pb.NewBiRequestStreamClient(c.conn).RequestBiStream(lasting)
	if err != nil {
		return plain(err)
	}
	c.stream = stream
	if err := c.send(typeSetup, struct {
		ClientVersion string            `json:"clientVersion"`
		Tenant        string            `json:"tenant"`
		Labels        map[string]string `json:"labels"`
		Module        string            `json:"module"`
	}{"regbridge", c.settings.tenant, map[string]string{"source": "sdk", "module": "naming"}, "internal"}); err != nil {
		return err
	}
	return c.ready(ctx, typeHealthCheck) // the server takes the introduction in when it gets to it
}

// ready asks until the server no longer says that it is not ready.
func (c *connection) ready(ctx context.Context, typ string) error {
	for pause := 20 * time.Millisecond; ; pause = min(2*pause, time.Second) {
		var a answer
		err := c.request(ctx, typ, nil, struct {
			Module string `json:"module"`
		}{"internal"}, &a)
		if !errors.Is(err, errNotReady) || registry.Sleep(ctx, pause) != nil {
			return err
		}
	}
}

// envelope wraps a message.
func (c *connection) envelope(typ string, headers map[string]string, body any) (*pb.Payload, error) {
	raw, err := json.Marshal(body)
	if err != nil {
		return nil, err
	}
	m := &pb.Metadata{Type: typ, Headers: headers}
	if ip := c.local.Load(); ip != nil {
		m.ClientIp = *ip
	}
	return &pb.Payload{Metadata: m, Body: &anypb.Any{Value: raw}}, nil
}

// send sends a message over the stream. Only one goroutine at a time does: setUp's, then that of receive.
func (c *connection) send(typ string, body any) error {
	p, err := c.envelope(typ, nil, body)
	if err != nil {
		return err
	}
	return plain(c.stream.Send(p))
}

// request asks, and decodes the answer. An answer that is no success, or no good, is an *answerError; if there is none in
// time, the error is context.DeadlineExceeded; any other means that the connection is lost.
func (c *connection) request(ctx context.Context, typ string, headers map[string]string, body any, into anyAnswer) error {
	ctx, cancel := context.WithTimeout(ctx, c.settings.timeout)
	defer cancel()
	p, err := c.envelope(typ, headers, body)
	if err != nil {
		return err
	}
	reply, err := pb.NewRequestClient(c.conn).Request(ctx, p)
	switch status.Code(err) {
	case codes.OK:
	case codes.DeadlineExceeded:
		return fmt.Errorf("no answer within %s: %w", c.settings.timeout, context.DeadlineExceeded)
	case codes.ResourceExhausted, codes.Internal, codes.Unknown: // the first is also too long an answer
		return &answerError{code: http.StatusOK, message: "with a failure: " + short(status.Convert(err).Message())}
	default:
		return plain(err)
	}
	if err := json.Unmarshal(reply.GetBody().GetValue(), into); err != nil {
		return &answerError{code: http.StatusOK, message: "with something that is not what it should be: " + err.Error()}
	}
	a := into.result()
	switch code := cmp.Or(a.ErrorCode, a.ResultCode); {
	case a.Success:
		return nil
	case code >= 300 && code < 400:
		return fmt.Errorf("%w (%d %s)", errNotReady, code, short(a.Message))
	default:
		return &answerError{code: code, message: short(a.Message)}
	}
}

// call makes a request about a service or a group, with credentials and within the server's budget.
func (c *connection) call(ctx context.Context, operation, typ string, k key, body any, into anyAnswer) error {
	budget := c.settings.env.Budgets.Of("nacos "+c.server.String(), concurrency)
	return c.auth.retry(ctx, k, func(headers map[string]string) error {
		if err := budget.Acquire(ctx, 1); err != nil { // not sooner: a login can take a while
			return err
		}
		defer budget.Release(1)
		began := time.Now()
		err := c.request(ctx, typ, headers, body, into)
		c.settings.env.Observe(operation, time.Since(began), err)
		return err
	})
}

func (c *connection) about(k key) naming {
	return naming{Namespace: c.settings.tenant, GroupName: k.group, ServiceName: k.name, Module: "naming"}
}

// services asks for one page of a group's services.
func (c *connection) services(ctx context.Context, group string, page, size int) (names []string, count int, err error) {
	var a struct {
		answer
		Count        *int     `json:"count"`
		ServiceNames []string `json:"serviceNames"`
	}
	err = c.call(ctx, "list", typeServiceList, key{group, ""}, struct {
		naming
		PageNo   int `json:"pageNo"`
		PageSize int `json:"pageSize"`
	}{c.about(key{group, ""}), page, size}, &a)
	if err == nil && a.Count == nil {
		err = &answerError{code: a.ResultCode, message: "without the number of services"}
	}
	if err != nil {
		return nil, 0, err
	}
	return a.ServiceNames, *a.Count, nil
}

// subscribe asks for a service and, if on, for pushes whenever it changes; if off, for no more of them.
func (c *connection) subscribe(ctx context.Context, k key, on bool) (serviceInfo, error) {
	var a struct {
		answer
		ServiceInfo serviceInfo `json:"serviceInfo"`
	}
	operation := "subscribe"
	if !on {
		operation = "unsubscribe"
	}
	err := c.call(ctx, operation, typeSubscribe, k, struct {
		naming
		Subscribe bool   `json:"subscribe"`
		Clusters  string `json:"clusters"` // all
	}{c.about(k), on, ""}, &a)
	return a.ServiceInfo, err
}

// check asks whether the server is there.
func (c *connection) check(ctx context.Context) error {
	var a answer
	return c.request(ctx, typeHealthCheck, nil, struct {
		Module string `json:"module"`
	}{"internal"}, &a)
}

// receive answers the server's requests until the connection ends, and hands pushes to push, with an error where a push
// could not be read completely. It returns why it ended.
func (c *connection) receive(push func(serviceInfo, error) error) error {
	for {
		p, err := c.stream.Recv()
		if err != nil {
			return fmt.Errorf("the connection ended: %w", plain(err))
		}
		var reply string
		typ := p.GetMetadata().GetType()
		switch typ {
		case typePush:
			reply = "NotifySubscriberResponse"
		case typeClientDetection:
			reply = "ClientDetectionResponse"
		case typeConnectReset:
			reply = "ConnectResetResponse"
		case typeSetupAck:
			reply = "SetupAckResponse"
		default:
			continue
		}
		var request struct {
			RequestID   string          `json:"requestId"`
			ServiceInfo json.RawMessage `json:"serviceInfo"`
		}
		if err := json.Unmarshal(p.GetBody().GetValue(), &request); err != nil {
			return fmt.Errorf("decode a %s of the server: %w", typ, err)
		}
		if err := c.send(reply, struct {
			RequestID  string `json:"requestId"`
			ResultCode int    `json:"resultCode"`
			Success    bool   `json:"success"`
		}{request.RequestID, http.StatusOK, true}); err != nil {
			return fmt.Errorf("answer a %s of the server: %w", typ, err)
		}
		switch typ {
		case typePush:
			var info serviceInfo
			err := json.Unmarshal(request.ServiceInfo, &info) // after a value of a wrong type, the rest is read
			if err := push(info, err); err != nil {
				return fmt.Errorf("decode a %s of the server: %w", typ, err)
			}
		case typeConnectReset:
			return fmt.Errorf("the server sends its clients away: %w", errMoved)
		}
	}
}

// plain takes gRPC's wrapping off an error.
func plain(err error) error {
	if err == nil {
		return nil
	}
	if s, ok := status.FromError(err); ok {
		return errors.New(s.Message())
	}
	return err
}
