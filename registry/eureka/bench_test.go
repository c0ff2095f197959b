package eureka

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/regbridge/regbridge/registry"
)

// canned answers without a network, so that only what the adapter does is measured: /apps in full, and an empty delta.
type canned struct {
	full  []byte // by gzip
	delta []byte
	asked int
}

func (c *canned) RoundTrip(r *http.Request) (*http.Response, error) {
	c.asked++
	body := c.full
	if strings.HasSuffix(r.URL.Path, "/delta") {
		body = c.delta
	}
	z, err := gzip.NewReader(bytes.NewReader(body)) // as http.Transport does
	if err != nil {
		return nil, err
	}
	return &http.Response{StatusCode: http.StatusOK, Body: z, Request: r}, nil
}

// discard is a sink that counts.
type discard struct{ puts int }

func (d *discard) Put(registry.Service) { d.puts++ }
func (*discard) Delete(string)          {}
func (*discard) Synced([]string)        {}
func (*discard) Fail(error, ...string)  {}

func zip(b []byte) []byte {
	var out bytes.Buffer
	z := gzip.NewWriter(&out)
	_, _ = z.Write(b)
	z.Close()
	return out.Bytes()
}

// bigServer answers as a server with 10,000 applications of 3 instances each.
func bigServer(b *testing.B) (*canned, int) {
	b.Helper()
	f := &fake{apps: map[string]map[string]*fakeInstance{}}
	for app := range 10_000 {
		for n := range 3 {
			ip := fmt.Sprintf("10.%d.%d.%d", n, app/250, app%250)
			f.change(fmt.Sprintf("SERVICE-%05d", app), ip+":service:8080", func(i *fakeInstance) {
				i.ip, i.metadata = ip, map[string]string{"management.port": "8080", "version": "v1", "zone": fmt.Sprintf("z%d", n)}
			})
		}
	}
	full := f.encode(1, func(yield func(app, id string, i *fakeInstance)) {
		for app, instances := range f.apps {
			for id, i := range instances {
				yield(app, id, i)
			}
		}
	})
	delta := f.encode(2, func(func(app, id string, i *fakeInstance)) {})
	return &canned{full: zip(full), delta: zip(delta)}, len(full)
}

func benchReader(b *testing.B, c *canned) (*reader, *discard) {
	b.Helper()
	r, err := New(registry.Entry{Domain: "eureka.invalid"}, testEnv(nil))
	if err != nil {
		b.Fatal(err)
	}
	s := &r.(*source).settings
	cl, err := newClient(s)
	if err != nil {
		b.Fatal(err)
	}
	cl.http.Transport = c
	sink := &discard{}
	return &reader{settings: s, client: cl, sink: sink, known: newKnown(), gap: true}, sink
}

// perInterval reports the share of one core that one reading per default interval takes.
func perInterval(b *testing.B, took time.Duration) {
	b.ReportMetric(100*took.Seconds()/float64(b.N)/registry.DefaultRefreshInterval.Seconds(), "%core")
}

// naive is what the same costs that reads everything each time, into package json's own types, and reports it.
func naive(c *canned, sink registry.Sink) error {
	resp, err := c.RoundTrip(&http.Request{URL: &url.URL{Path: "/eureka/apps"}})
	if err != nil {
		return err
	}
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	var list struct {
		Applications struct {
			Application []struct {
				Name     string
				Instance []instanceInfo
			}
		}
	}
	if err := json.Unmarshal(body, &list); err != nil {
		return err
	}
	for _, a := range list.Applications.Application {
		records := make([]record, len(a.Instance))
		for n := range a.Instance {
			records[n] = choice{secure: secureAuto}.record(&a.Instance[n])
		}
		sink.Put(service(a.Name, records))
	}
	return nil
}

// BenchmarkNaive is what the others are to be compared with.
func BenchmarkNaive(b *testing.B) {
	c, size := bigServer(b)
	b.SetBytes(int64(size))
	b.ReportAllocs()
	for b.Loop() {
		if err := naive(c, &discard{}); err != nil {
			b.Fatal(err)
		}
	}
	perInterval(b, b.Elapsed())
}

// BenchmarkFullFetch reads 10,000 applications that are known already.
func BenchmarkFullFetch(b *testing.B) {
	c, size := bigServer(b)
	r, _ := benchReader(b, c)
	b.SetBytes(int64(size))
	b.ReportAllocs()
	for b.Loop() {
		r.fullAt = time.Time{}
		if err := r.read(b.Context()); err != nil {
			b.Fatal(err)
		}
	}
	perInterval(b, b.Elapsed())
	if len(r.known.apps) != 10_000 || r.known.hash() != "UP_30000_" {
		b.Fatalf("%d applications, %s", len(r.known.apps), r.known.hash())
	}
}

// BenchmarkDeltaAtRest is one refresh interval of 10,000 applications in which nothing changes. The factor says how many
// times longer a naive full reading takes.
func BenchmarkDeltaAtRest(b *testing.B) {
	c, _ := bigServer(b)
	began := time.Now()
	if err := naive(c, &discard{}); err != nil {
		b.Fatal(err)
	}
	whole := time.Since(began)
	r, sink := benchReader(b, c)
	if err := r.read(b.Context()); err != nil {
		b.Fatal(err)
	}
	asked, puts := c.asked, sink.puts
	b.ReportAllocs()
	for b.Loop() {
		if err := r.read(b.Context()); err != nil {
			b.Fatal(err)
		}
	}
	if c.asked-asked != b.N || sink.puts != puts {
		b.Fatalf("%d requests and %d reports in %d intervals without a change", c.asked-asked, sink.puts-puts, b.N)
	}
	perInterval(b, b.Elapsed())
	b.ReportMetric(float64(c.asked-asked)/float64(b.N), "requests/op")
	b.ReportMetric(whole.Seconds()*float64(b.N)/b.Elapsed().Seconds(), "naive/op")
}
