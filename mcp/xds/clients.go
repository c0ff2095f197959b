package xds

import (
	"cmp"
	"maps"
	"slices"
	"time"
)

// A Client is one open stream, as /debug/clients shows it.
type Client struct {
	// Peer is the client's address, Node the node id that it states.
	Peer string `json:"peer"`
	Node string `json:"node"`
	// Listener is "base", or "INDEX/COUNT" for a shard.
	Listener string `json:"listener"`
	// Protocol is "sotw" or "delta".
	Protocol string    `json:"protocol"`
	Since    time.Time `json:"since"`
	// Types are what the stream asked for, by type URL.
	Types []ClientType `json:"types"`
}

// A ClientType is what one stream has of one type.
type ClientType struct {
	// TypeURL is as the client wrote it.
	TypeURL string `json:"typeUrl"`
	// Names are what it is subscribed to, sorted; ["*"] is everything.
	Names []string `json:"names"`
	// Held says that the first answer waits until all registries are loaded.
	Held bool `json:"held,omitempty"`
	// Sent is the version of the last response, Acked of the last that the client took; empty before the first one.
	Sent  string `json:"sent"`
	Acked string `json:"acked"`
	// Nonce and SentAt are of the last response.
	Nonce  string    `json:"nonce"`
	SentAt time.Time `json:"sentAt,omitzero"`
	// NACKs counts the responses that the client refused; LastError is what it said of the last of them.
	NACKs       int       `json:"nacks"`
	LastError   string    `json:"lastError,omitempty"`
	LastErrorAt time.Time `json:"lastErrorAt,omitzero"`
}

// Clients returns all open streams, oldest first.
func (c *Cache) Clients() []Client {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := make([]Client, 0, len(c.streams))
	for s := range c.streams {
		cl := Client{Peer: s.peer, Node: s.node, Listener: s.listener, Protocol: s.protocol, Since: s.since,
			Types: []ClientType{}}
		for _, url := range slices.Sorted(maps.Keys(s.subs)) {
			if sub := s.subs[url]; sub.started {
				cl.Types = append(cl.Types, sub.describe())
			}
		}
		out = append(out, cl)
	}
	slices.SortFunc(out, func(a, b Client) int {
		return cmp.Or(a.Since.Compare(b.Since), cmp.Compare(a.Peer, b.Peer))
	})
	return out
}

func (s *subscription) describe() ClientType {
	t := ClientType{
		TypeURL: s.url, Held: s.gated(), Sent: s.sent, Acked: s.acked, Nonce: s.nonce, SentAt: s.sentAt,
		NACKs: s.nacks, LastError: s.refusal, LastErrorAt: s.refusedAt, Names: []string{},
	}
	if s.wildcard {
		t.Names = append(t.Names, "*")
	}
	t.Names = append(t.Names, slices.Sorted(maps.Keys(s.names))...)
	return t
}
