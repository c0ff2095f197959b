// Package e2e holds the end-to-end tests: real registries, a regbridge process, a real istiod, a real Envoy as its sidecar,
// and HTTP upstreams on 127.0.0.x. They assert on what istiod's debug pages say that it has, and on live requests through
// Envoy. What regbridge says of itself counts only beside that: what it holds, and why.
//
// Lines of the tests' logs that begin with "measured:" are the figures of docs/performance.md.
package e2e
