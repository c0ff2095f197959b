package eureka

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/tls"
	"errors"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/regbridge/regbridge/registry"
	"github.com/regbridge/regbridge/test/harness"
)

// TestBadAnswers is about answers that are no list of applications. None is taken for an empty one.
func TestBadAnswers(t *testing.T) {
	whole, err := os.ReadFile("testdata/apps-2.json")
	if err != nil {
		t.Fatal(err)
	}
	xml, err := os.ReadFile("testdata/apps-2.xml")
	if err != nil {
		t.Fatal(err)
	}
	bodies := map[string]string{
		"a page":                      "<!doctype html><html><body>Welcome</body></html>",
		"XML":                         string(xml),
		"nothing":                     "",
		"blanks":                      " \n",
		"an empty object":             "{}",
		"a list":                      "[]",
		"null":                        "null",
		"a text":                      `"applications"`,
		"another object":              `{"status":"UP","applicationsX":{}}`,
		"null applications":           `{"applications":null}`,
		"applications without a list": `{"applications":{}}`,
		"a text for a list":           `{"applications":{"apps__hashcode":"","application":"none"}}`,
		"a number for a list":         `{"applications":{"apps__hashcode":"","application":3}}`,
		"counted and not listed":      `{"applications":{"versions__delta":"1","apps__hashcode":"UP_3_","application":[]}}`,
		"counted and without a list":  `{"applications":{"versions__delta":"1","apps__hashcode":"UP_3_"}}`,
		"cut off":                     string(whole[:len(whole)-1]),
		"cut off in the midst":        string(whole[:len(whole)/2]),
		"cut off before the list":     `{"applications":{"versions__delta":"1","apps__hashcode":"`,
		"something after it":          string(whole) + "x",
		"twice":                       string(whole) + string(whole),
		"one instance too long":       `{"applications":{"application":[{"name":"A","instance":[{"hostName":"` + strings.Repeat("a", maxStep) + `"}]}]}}`,
	}
	for name, body := range bodies {
		t.Run(name, func(t *testing.T) {
			f := newFake(t)
			f.bodies["/apps"] = body
			s := newStepper(t, f)
			if err := s.read(t.Context()); err == nil {
				t.Errorf("taken for %v", s.rec.State().Services)
			}
			if n := len(s.rec.State().Events); n > 0 {
				t.Errorf("reported %v", s.rec.State().Events)
			}
		})
	}
}

func TestStatus(t *testing.T) {
	for code, advice := range map[int]string{
		204: "answered 204", 301: "redirect", 302: "redirect", 307: "redirect", 401: "authSecretName", 403: "just started", 404: "eurekaContextPath",
		429: "429", 500: "500", 503: "503",
	} {
		f := newFake(t)
		f.status["/apps"] = code
		f.location = "/eureka/elsewhere"
		s := newStepper(t, f)
		if err := s.read(t.Context()); err == nil || !strings.Contains(err.Error(), advice) {
			t.Errorf("%d: the error is %v", code, err)
		}
		if got := f.requests(); len(got) != 1 {
			t.Errorf("%d: asked for %v", code, got)
		}
	}
}

// TestInterrupted is about answers that do not come to their end.
func TestInterrupted(t *testing.T) {
	f := newFake(t)
	f.register("ORDERS", "10.0.0.1")
	s := newStepper(t, f)
	s.ok(t)
	const half = `{"applications":{"versions__delta":"1","apps__hashcode":"","application":[`
	for name, tc := range map[string]struct {
		send   func(w http.ResponseWriter, r *http.Request)
		reason string
	}{
		"the connection breaks": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "1000")
			_, _ = w.Write([]byte(half))
		}, "read the answer"},
		"nothing more comes": {func(w http.ResponseWriter, r *http.Request) {
			_, _ = w.Write([]byte(half))
			_ = http.NewResponseController(w).Flush()
			<-r.Context().Done()
		}, "no answer in time"},
		"no gzip": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Encoding", "gzip")
			_, _ = w.Write([]byte(half))
		}, "read the answer"},
		"a bomb": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Encoding", "gzip")
			z := gzip.NewWriter(w)
			_, _ = z.Write([]byte(half))
			for range 1024 {
				if _, err := z.Write(make([]byte, 64<<10)); err != nil {
					break
				}
			}
			z.Close()
		}, ""},
		"a bomb of blanks": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Encoding", "gzip")
			z := gzip.NewWriter(w)
			_, _ = z.Write([]byte(half))
			for blanks := bytes.Repeat([]byte(" "), 64<<10); ; {
				if _, err := z.Write(blanks); err != nil {
					break
				}
			}
		}, "more than"}, // before it has cost much
	} {
		for _, path := range []string{"/apps", "/apps/delta"} {
			t.Run(name+path, func(t *testing.T) {
				if s.timeout = limit; name == "nothing more comes" {
					s.timeout = 200 * time.Millisecond
				}
				f.edit(func() {
					f.raw = func(w http.ResponseWriter, r *http.Request) bool {
						if strings.HasSuffix(r.URL.Path, path) {
							tc.send(w, r)
							return true
						}
						return false
					}
				})
				if path == "/apps" {
					s.fullAt = time.Now()
				} else {
					s.fullAt = time.Now().Add(time.Hour)
				}
				s.noDelta = time.Time{}
				before := len(s.rec.State().Events)
				err := s.read(t.Context())
				if tc.reason == "" && path == "/apps/delta" { // no JSON: everything is read instead
					if err != nil {
						t.Error(err)
					}
					return
				}
				if err == nil || !strings.Contains(err.Error(), tc.reason) {
					t.Errorf("the error is %v", err)
				}
				if events := s.rec.State().Events; len(events) != before {
					t.Errorf("reported %v", events[before:])
				}
			})
		}
	}
	t.Run("a slow answer is waited for while it comes", func(t *testing.T) {
		body, err := os.ReadFile("testdata/apps-2.json")
		if err != nil {
			t.Fatal(err)
		}
		f.edit(func() {
			f.raw = func(w http.ResponseWriter, r *http.Request) bool {
				for part := range bytesChunks(body, 200) {
					_, _ = w.Write(part)
					_ = http.NewResponseController(w).Flush()
					_ = registry.Sleep(r.Context(), 100*time.Millisecond) // what is tested is time
				}
				return true
			}
		})
		s.timeout, s.fullAt = time.Second, time.Now()
		if err := s.read(t.Context()); err != nil {
			t.Error(err)
		}
	})
}

func bytesChunks(b []byte, size int) func(func([]byte) bool) {
	return func(yield func([]byte) bool) {
		for len(b) > 0 {
			n := min(size, len(b))
			if !yield(b[:n]) {
				return
			}
			b = b[n:]
		}
	}
}

func TestCredentials(t *testing.T) {
	for name, tc := range map[string]struct {
		secret registry.Credentials
		reason string // of the error; empty means that it works
		asks   int
	}{
		"eurekaUsername":             {registry.Credentials{"eurekaUsername": goodUser, "eurekaPassword": goodPassword}, "", 1},
		"username":                   {registry.Credentials{"username": goodUser, "password": goodPassword}, "", 1},
		"eurekaUsername goes before": {registry.Credentials{"eurekaUsername": goodUser, "eurekaPassword": goodPassword, "username": "x", "password": "y"}, "", 1},
		"another password":           {registry.Credentials{"username": goodUser, "password": "wrong-one"}, "check user and password in the Secret login", 1},
		"no password":                {registry.Credentials{"username": goodUser}, "secret login lacks", 0},
		"no user":                    {registry.Credentials{"password": goodPassword}, "secret login lacks", 0},
		"nothing in it":              {registry.Credentials{"tls.crt": "x"}, "secret login lacks", 0},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFake(t)
			f.user, f.cookie = goodUser, true
			s := newStepper(t, f, func(e *registry.Entry) { e.AuthSecretName = "login" })
			s.env.Credentials = func() (registry.Credentials, error) { return tc.secret, nil }
			err := s.read(t.Context())
			if (err == nil) != (tc.reason == "") || err != nil && !strings.Contains(err.Error(), tc.reason) {
				t.Errorf("the error is %v", err)
			}
			for _, secret := range tc.secret {
				if err != nil && strings.Contains(err.Error(), secret.Reveal()) {
					t.Errorf("the error shows the secret %s", secret.Reveal())
				}
			}
			if got := f.requests(); len(got) != tc.asks {
				t.Errorf("asked for %v", got)
			}
			if err == nil {
				s.ok(t)
			}
			for _, r := range f.seen {
				if len(r.Cookies()) > 0 {
					t.Error("a cookie was kept")
				}
			}
		})
	}
	t.Run("the Secret cannot be read", func(t *testing.T) {
		f := newFake(t)
		s := newStepper(t, f)
		broken := errors.New("no such secret")
		s.env.Credentials = func() (registry.Credentials, error) { return nil, broken }
		if err := s.read(t.Context()); !errors.Is(err, broken) {
			t.Errorf("the error is %v", err)
		}
	})
}

func TestRedirectCarriesNothing(t *testing.T) {
	f, other := newFake(t), newFake(t)
	f.user = goodUser
	f.status["/apps"], f.location = http.StatusFound, "http://"+other.address+"/eureka/apps"
	s := newStepper(t, f)
	s.env.Credentials = func() (registry.Credentials, error) {
		return registry.Credentials{"username": goodUser, "password": goodPassword}, nil
	}
	if err := s.read(t.Context()); err == nil || !strings.Contains(err.Error(), "redirect") {
		t.Errorf("the error is %v", err)
	}
	if n := len(other.requests()); n > 0 {
		t.Error("the redirect was followed")
	}
}

func TestContextPath(t *testing.T) {
	for in, want := range map[string]string{
		"": "/eureka", " ": "/eureka", "/": "", "eureka": "/eureka", "/eureka/": "/eureka", "/eureka/v2": "/eureka/v2", "a//b/": "/a/b",
	} {
		f := newFake(t)
		f.path = want
		s := newStepper(t, f, func(e *registry.Entry) { e.EurekaContextPath = in })
		f.register("ORDERS", "10.0.0.1")
		if got, _ := s.ok(t); got != "/apps" {
			t.Errorf("%q: asked for %q", in, got)
		}
		s.agrees(t)
	}
	for _, in := range []string{"http://host/eureka", "/eureka?x=1", "/eureka#x", "/a b", "/user:pw@host", "/../x", "/a%2fb"} {
		_, err := New(registry.Entry{Domain: "host", EurekaContextPath: in}, testEnv(nil))
		if fields := registry.FieldErrors(err); len(fields) != 1 || fields[0].Path != "eurekaContextPath" {
			t.Errorf("%q: the error is %v", in, err)
		}
	}
}

func TestNew(t *testing.T) {
	for name, tc := range map[string]struct {
		entry  registry.Entry
		paths  string // of the problems
		usable bool
	}{
		"least":              {registry.Entry{Domain: "eureka.internal"}, "", true},
		"no server":          {registry.Entry{}, "domain", false},
		"one of two servers": {registry.Entry{Domain: "good, bad host"}, "domain[1]", true},
		"no good server":     {registry.Entry{Domain: "bad host"}, "domain[0]", false},
		"port":               {registry.Entry{Domain: "host", Port: 70000}, "port", false},
		"secure":             {registry.Entry{Domain: "host", EurekaSecure: "sometimes"}, "eurekaSecure", false},
		"all values":         {registry.Entry{Domain: "host", EurekaSecure: "always", EurekaPreferHostName: true}, "", true},
	} {
		r, err := New(tc.entry, testEnv(nil))
		var paths []string
		for _, f := range registry.FieldErrors(err) {
			paths = append(paths, f.Path)
		}
		if got := strings.Join(paths, " "); got != tc.paths || (r != nil) != tc.usable {
			t.Errorf("%s: %v, %v", name, r, err)
		}
	}
	r, err := New(registry.Entry{Domain: "a, b:1, [::1]"}, testEnv(nil))
	if err != nil {
		t.Fatal(err)
	}
	if s := r.(*source); s.servers[0].Port != 8761 || s.servers[1].Port != 1 || s.servers[2].String() != "[::1]:8761" || s.interval != 30*time.Second {
		t.Errorf("%+v", s.settings)
	}
}

// TestTLS is about certificates of both sides; the client's is read anew for each connection.
func TestTLS(t *testing.T) {
	ca := harness.NewCA(t, "eureka")
	f := newFake(t)
	f.stop()
	f.tls = ca.ServerTLS(t, "127.0.0.1")
	f.tls.ClientAuth, f.tls.ClientCAs = tls.RequireAndVerifyClientCert, ca.Pool()
	f.start()
	f.register("ORDERS", "10.0.0.1")
	config := &tls.Config{MinVersion: tls.VersionTLS12}
	s := newStepper(t, f)
	s.env.ClientTLS = func() (*tls.Config, error) { return config.Clone(), nil }
	c, err := newClient(s.settings)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.close)
	s.client = c
	if err := s.read(t.Context()); err == nil || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("without the CA: %v", err)
	}
	config.RootCAs = ca.Pool()
	if err := s.read(t.Context()); err == nil || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("without a certificate: %v", err)
	}
	config.Certificates = ca.ServerTLS(t, "client").Certificates
	s.ok(t)
	s.agrees(t)
	config.ServerName = "another"
	c.close()
	if err := s.read(t.Context()); err == nil || !strings.Contains(err.Error(), "another") {
		t.Errorf("with another name: %v", err)
	}
	f.stop()
	f.tls = nil
	f.start()
	if err := s.read(t.Context()); err == nil {
		t.Error("plain text was taken")
	}

	broken := errors.New("no such file")
	r, err := New(f.entry(), func() registry.Env {
		env := testEnv(nil)
		env.ClientTLS = func() (*tls.Config, error) { return nil, broken }
		return env
	}())
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Run(context.Background(), s.rec); !errors.Is(err, broken) {
		t.Errorf("Run: %v", err)
	}
}
