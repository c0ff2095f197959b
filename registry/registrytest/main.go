package registrytest

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// rubbish gives variables that libraries read and no adapter may. Values are as misleading as can be.
func rubbish() map[string]string {
	return map[string]string{
		"CONSUL_HTTP_ADDR":                       "https://192.0.2.1:1",
		"CONSUL_HTTP_TOKEN":                      "rubbish",
		"CONSUL_HTTP_TOKEN_FILE":                 "/nonexistent/rubbish",
		"CONSUL_HTTP_AUTH":                       "rubbish:rubbish",
		"CONSUL_HTTP_SSL":                        "true",
		"CONSUL_HTTP_SSL_VERIFY":                 "false",
		"CONSUL_CACERT":                          "/nonexistent/rubbish",
		"CONSUL_CAPATH":                          "/nonexistent/rubbish",
		"CONSUL_CLIENT_CERT":                     "/nonexistent/rubbish",
		"CONSUL_CLIENT_KEY":                      "/nonexistent/rubbish",
		"CONSUL_TLS_SERVER_NAME":                 "rubbish",
		"CONSUL_NAMESPACE":                       "rubbish",
		"CONSUL_PARTITION":                       "rubbish",
		"CONSUL_GRPC_ADDR":                       "192.0.2.1:1",
		"nacos_serverAddr":                       "192.0.2.1:1",
		"nacos_username":                         "rubbish",
		"nacos_password":                         "rubbish",
		"nacos_remote_client_rpc_tls_enable":     "true",
		"nacos_remote_client_rpc_tls_mutualAuth": "true",
		"nacos_remote_client_rpc_tls_trustCollectionChainPath": "/nonexistent/rubbish",
		"nacos_remote_client_rpc_tls_certChainFile":            "/nonexistent/rubbish",
		"nacos_remote_client_rpc_tls_certPrivateKey":           "/nonexistent/rubbish",
		"LOCALDOMAIN": "rubbish.invalid",
		"RES_OPTIONS": "ndots:9 timeout:1 attempts:1",
		"NO_PROXY":    "",
		"no_proxy":    "",
	}
}

// hitsPath is where the proxy tells how many requests it got.
const hitsPath = "/registrytest-hits"

// Main is the TestMain of an adapter's package. It fills the process's environment with rubbish that no adapter may read,
// HTTP proxies among it, runs the tests, and looks for goroutines that are left.
func Main(m *testing.M) { goleak.VerifyTestMain(&suite{m}) }

type suite struct{ m *testing.M }

func (s *suite) Run() int {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		fmt.Fprintln(os.Stderr, "registrytest: listen for the proxy:", err)
		return 1
	}
	var hits atomic.Int64
	proxy := &http.Server{
		ReadHeaderTimeout: 10 * time.Second,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == hitsPath && r.URL.Host == "" {
				fmt.Fprint(w, hits.Load())
				return
			}
			hits.Add(1)
			http.Error(w, "no adapter may use a proxy of the environment", http.StatusTeapot)
		}),
	}
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = proxy.Serve(l)
	}()
	defer func() {
		_ = proxy.Close()
		<-served
	}()
	for k, v := range rubbish() {
		if err := os.Setenv(k, v); err != nil {
			fmt.Fprintln(os.Stderr, "registrytest:", err)
			return 1
		}
	}
	for _, k := range []string{"HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"} {
		if err := os.Setenv(k, "http://"+l.Addr().String()); err != nil {
			fmt.Fprintln(os.Stderr, "registrytest:", err)
			return 1
		}
	}
	return s.m.Run()
}

// proxyHits returns how many requests were sent to the proxy of the environment.
func proxyHits(t *testing.T) string {
	t.Helper()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 5 * time.Second}
	resp, err := client.Get(os.Getenv("HTTP_PROXY") + hitsPath)
	if err != nil {
		t.Fatalf("ask the proxy for its hits: %v", err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatalf("ask the proxy for its hits: %v", err)
	}
	return string(b)
}
