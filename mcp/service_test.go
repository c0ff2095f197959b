package mcp

import (
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestParseProtocol(t *testing.T) {
	for in, want := range map[string]Protocol{
		"": "", "tcp": TCP, "HTTP": HTTP, "Http2": HTTP2, " https ": HTTPS, "grpc": GRPC, "triple": GRPC, "tri": GRPC,
		"grpcs": GRPCS, "DUBBO": Dubbo, "rest": HTTP, "http/1.1": Unsupported,
	} {
		if got := ParseProtocol(in); got != want {
			t.Errorf("ParseProtocol(%q) = %q, want %q", in, got, want)
		}
	}
}
