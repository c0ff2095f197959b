package nacos

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"maps"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/regbridge/regbridge/registry"
	"github.com/regbridge/regbridge/registry/registrytest"
)

// heldSecret gives an Env other credentials, which can be changed.
type heldSecret struct {
	mu  sync.Mutex
	now registry.Credentials
}

func (c *heldSecret) set(pairs ...string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = registry.Credentials{}
	for i := 0; i < len(pairs); i += 2 {
		c.now[pairs[i]] = registry.Secret(pairs[i+1])
	}
}

func (c *heldSecret) get() (registry.Credentials, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return maps.Clone(c.now), nil
}

// withAuth is a fake that wants credentials, a client of it, and what that client is given.
func withAuth(t *testing.T, pairs ...string) (*httpFake, *api, *heldSecret) {
	t.Helper()
	f, c := newHTTPFake(t), &heldSecret{}
	f.auth = true
	f.fill(1)
	c.set(pairs...)
	env := f.env()
	env.Credentials = c.get
	return f, f.api(f.settings(env)), c
}

func list(t *testing.T, a *api) error {
	t.Helper()
	names, count, err := a.services(t.Context(), "DEFAULT_GROUP", 1, 10)
	if err == nil && (len(names) != 1 || count != 1) {
		t.Errorf("got %v of %d", names, count)
	}
	return err
}

// refusedAs checks an error about credentials: it is known as that, says what the reason is, and shows no credentials.
func refusedAs(t *testing.T, err error, reason string) {
	t.Helper()
	if !errors.Is(err, errRefused) || !strings.Contains(err.Error(), reason) {
		t.Errorf("the error is %v; it should be a refusal that says %q", err, reason)
	}
	showsNone(t, err.Error())
}

func showsNone(t *testing.T, text string) {
	t.Helper()
	for _, secret := range []string{goodUser, goodPassword, "s3cret", "wrong-one", "token-", goodSecret} {
		if strings.Contains(text, secret) {
			t.Errorf("%q shows %s", text, secret)
		}
	}
}

func (f *httpFake) loginsTried() int {
	n := 0
	for _, tried := range f.logins {
		n += tried
	}
	return n
}

func TestLogin(t *testing.T) {
	for name, c := range map[string]struct {
		version string
		paths   []string
	}{
		"1.4.1":                     {"1.4.1", []string{"/nacos/v1/auth/login", "/nacos/v1/auth/users/login"}},
		"before 1.2":                {"1.1.4", []string{"/nacos/v1/auth/login"}},
		"2.3.2":                     {"2.3.2", []string{"/nacos/v1/auth/login", "/nacos/v1/auth/users/login"}},
		"3.1.0":                     {"3.1.0", []string{"/nacos/v1/auth/login", "/nacos/v1/auth/users/login", "/nacos/v3/auth/user/login"}},
		"3.1.0 without what is old": {"3.1.0", []string{"/nacos/v3/auth/user/login"}},
	} {
		t.Run(name, func(t *testing.T) {
			for _, keys := range [][2]string{{"nacosUsername", "nacosPassword"}, {"username", "password"}} {
				f, a, secret := withAuth(t, keys[0], goodUser, keys[1], goodPassword)
				f.edit(func() {
					f.version, f.logins = c.version, map[string]int{}
					for _, path := range c.paths {
						f.logins[path] = 0
					}
				})
				for range 3 {
					if err := list(t, a); err != nil {
						t.Fatal(err)
					}
				}
				f.edit(func() {
					if n := f.loginsTried(); n != 1 {
						t.Errorf("%d logins for three requests", n)
					}
				})
				secret.set(keys[0], goodUser, keys[1], "wrong-one")
				f.edit(func() { clear(f.tokens) })
				reason := map[byte]string{'1': "unknown user!", '2': "user not found!", '3': "500 No message available"}[c.version[0]]
				refusedAs(t, list(t, a), reason)
			}
		})
	}
}

func TestRefusedRequests(t *testing.T) {
	for version, reason := range map[string]string{"1.4.1": "authorization failed!", "2.3.2": "authorization failed!", "3.1.0": "Code: 403"} {
		f, a, secret := withAuth(t, "nacosUsername", goodUser, "nacosPassword", goodPassword)
		f.edit(func() { f.version, f.denied[goodUser] = version, true })
		refusedAs(t, list(t, a), reason)
		f.edit(func() {
			if logins, lists := f.loginsTried(), f.count(listPath, ""); logins != 2 || lists != 2 {
				t.Errorf("%s: %d logins and %d requests where the user has no rights", version, logins, lists)
			}
		})
		secret.set("nacosUser", goodUser) // misspelt: read as nobody, a server may show less
		refusedAs(t, list(t, a), "neither nacosUsername and nacosPassword nor")
		secret.set()
		a.secret = ""
		refusedAs(t, list(t, a), "the entry has none")
		secret.set("nacosUsername", goodUser) // and no password
		f.edit(func() { clear(f.tokens) })
		if err := list(t, a); !errors.Is(err, errRefused) {
			t.Errorf("%s: without a password: %v", version, err)
		}
	}
}

func TestLoginFails(t *testing.T) {
	const path = "/nacos/v1/auth/users/login"
	for name, c := range map[string]struct {
		code    int
		body    string
		reason  string
		refused bool
	}{
		"starting":                    {503, "server is STARTING now", "answered 503 server is STARTING now", false},
		"gateway":                     {502, "<html>bad gateway</html>", "answered 502", false},
		"redirect":                    {302, "", "redirect", false},
		"no token":                    {200, `{"code":200}`, "no token", false},
		"HTML":                        {200, "<html>", "not what it should be", false},
		"repeats the password":        {403, "bad password " + goodPassword + " of x", "403", true},
		"repeats the user":            {403, `{"message":"user ` + goodUser + ` not found"}`, "403", true},
		"repeats the form":            {403, "bad request: username=x&password=s3cret+%26+100%2540+of+the+tests", "403", true},
		"repeats the password, later": {500, strings.Repeat("x", 190) + " " + goodPassword, "500", true},
		"bad request":                 {400, "Param 'username' is required.", "400 Param", true},
	} {
		t.Run(name, func(t *testing.T) {
			f, a, _ := withAuth(t, "nacosUsername", goodUser, "nacosPassword", goodPassword)
			f.edit(func() { f.status[path], f.bodies[path] = c.code, c.body })
			err := list(t, a)
			if err == nil || errors.Is(err, errRefused) != c.refused || !strings.Contains(err.Error(), c.reason) {
				t.Errorf("got %v, refused %v", err, errors.Is(err, errRefused))
			}
			showsNone(t, err.Error())
			f.edit(func() {
				if n := f.count(listPath, ""); n > 0 {
					t.Errorf("%d requests without a login", n)
				}
			})
		})
	}
	f, a, _ := withAuth(t, "nacosUsername", goodUser, "nacosPassword", goodPassword)
	f.edit(func() { clear(f.logins) })
	if err := list(t, a); err == nil || !strings.Contains(err.Error(), "no login") || errors.Is(err, errRefused) {
		t.Errorf("a server without a login: %v", err)
	}
}

// TestRenewal: a new login comes before the old one is over.
func TestRenewal(t *testing.T) {
	t.Parallel()
	f, a, _ := withAuth(t, "nacosUsername", goodUser, "nacosPassword", goodPassword)
	const ttl = 10 * time.Minute
	f.edit(func() { f.ttl = ttl })
	began := time.Now()
	for n, want := range []int{1, 1, 2, 2} {
		if err := list(t, a); err != nil {
			t.Fatal(err)
		}
		f.edit(func() {
			if got := f.loginsTried(); got != want {
				t.Errorf("%d logins after %d requests, want %d", got, n+1, want)
			}
		})
		if due := a.auth.renew; !due.After(began) || !due.Before(began.Add(ttl)) {
			t.Errorf("a login that is good for %v is renewed after %v", ttl, due.Sub(began))
		}
		if n == 1 { // time passes
			a.auth.renew = time.Now().Add(-time.Second)
		}
	}
}

// TestTokenWithoutEnd is given a token of which nothing says how long it is good: it is not asked for again at once.
func TestTokenWithoutEnd(t *testing.T) {
	t.Parallel()
	f, a, _ := withAuth(t, "nacosUsername", goodUser, "nacosPassword", goodPassword)
	const path = "/nacos/v1/auth/users/login"
	f.edit(func() { f.auth, f.bodies[path] = false, `{"accessToken":"token-0"}` })
	for range 3 {
		if err := list(t, a); err != nil {
			t.Fatal(err)
		}
	}
	if left := time.Until(a.auth.renew); left < time.Minute || left > time.Hour {
		t.Errorf("the next login is due in %v", left)
	}
	f.edit(func() {
		if n := f.count(path, ""); n != 1 {
			t.Errorf("%d logins", n)
		}
	})
}

// each request.
func TestRenewalRefused(t *testing.T) {
	f, a, _ := withAuth(t, "nacosUsername", goodUser, "nacosPassword", goodPassword)
	var log bytes.Buffer
	a.env.Logger = slog.New(slog.NewTextHandler(&log, nil))
	if err := list(t, a); err != nil {
		t.Fatal(err)
	}
	f.edit(func() { f.users[goodUser] = "another" })
	a.auth.mu.Lock()
	a.auth.renew = time.Now()
	a.auth.mu.Unlock()
	for range 5 {
		if err := list(t, a); err != nil {
			t.Fatal(err)
		}
	}
	f.edit(func() {
		if n := f.loginsTried(); n != 2 {
			t.Errorf("%d logins; one was good, and one was refused", n)
		}
		clear(f.tokens) // now the old one is over
	})
	if n := strings.Count(log.String(), "cannot be renewed"); n != 1 {
		t.Errorf("told %d times", n)
	}
	showsNone(t, log.String())
	refusedAs(t, list(t, a), "unknown user!")
	for range 5 {
		refusedAs(t, list(t, a), "unknown user!")
	}
	f.edit(func() {
		if n := f.loginsTried(); n != 3 {
			t.Errorf("%d logins; a refused one stands for a while", n)
		}
		f.users[goodUser] = goodPassword
	})
	for deadline := time.Now().Add(limit); list(t, a) != nil; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the good password is not tried")
		}
	}
}

// TestLoginHangs: what waits for a login waits for one of them, not for one after the other.
func TestLoginHangs(t *testing.T) {
	t.Parallel()
	f, a, _ := withAuth(t, "nacosUsername", goodUser, "nacosPassword", goodPassword)
	f.edit(func() { f.hanging = true })
	a.timeout = 300 * time.Millisecond
	began := time.Now()
	var wg sync.WaitGroup
	for range concurrency {
		wg.Go(func() {
			if err := list(t, a); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("got %v", err)
			}
		})
	}
	wg.Wait()
	if took := time.Since(began); took > 4*a.timeout {
		t.Errorf("it took %v, with a timeout of %v", took, a.timeout)
	}
}

// TestManyRefusedAtOnce: requests that are refused together share one new login.
func TestManyRefusedAtOnce(t *testing.T) {
	f, a, _ := withAuth(t, "nacosUsername", goodUser, "nacosPassword", goodPassword)
	if err := list(t, a); err != nil {
		t.Fatal(err)
	}
	f.edit(func() {
		clear(f.tokens)
		f.tokens["unrelated"] = fakeLogin{} // the next token has another name
		f.delay = 20 * time.Millisecond
	})
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			if _, err := a.instances(t.Context(), key{"DEFAULT_GROUP", "service-0000"}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	f.edit(func() {
		if n := f.loginsTried(); n != 2 {
			t.Errorf("%d logins; the first one, and one for all", n)
		}
	})
}

// TestHTTPPasswordChanged: while the server refuses the password nothing is taken away, and it is not tried often; with the new
// one in the Secret all goes on.
func TestHTTPPasswordChanged(t *testing.T) {
	for _, version := range []string{"1.4.1", "2.3.2", "3.1.0"} {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			f, _, secret := withAuth(t, "nacosUsername", goodUser, "nacosPassword", goodPassword)
			f.fill(20)
			f.edit(func() { f.version = version })
			env := f.env()
			env.Credentials = secret.get
			r := runHTTP(t, f.entry(), env)
			n := len(r.loaded().Events)
			f.edit(func() {
				f.users[goodUser] = "another"
				clear(f.tokens)
				for k := range f.logins {
					f.logins[k] = 0
				}
				f.seen = nil
			})
			s := r.wait("some gaps", func(s registrytest.State) bool { return since(s, n, registrytest.Fail) >= 4 })
			unchanged(t, s, n, "wrong password")
			refusedAs(t, s.Gap, "refuses our credentials")
			f.edit(func() {
				if logins, all := f.loginsTried(), len(f.seen); logins > 6 || all > 20 {
					t.Errorf("%d logins, %d requests", logins, all)
				}
			})
			secret.set("nacosUsername", goodUser, "nacosPassword", "another")
			s = r.wait("the end of the gap", func(s registrytest.State) bool { return s.Gap == nil })
			unchanged(t, s, n, "new password")
		})
	}
}

// TestSign has what `openssl dgst -sha1 -hmac` makes of the same.
func TestSign(t *testing.T) {
	at := time.UnixMilli(1700000000000)
	for k, want := range map[key][2]string{
		{"DEFAULT_GROUP", "order"}: {"1700000000000@@DEFAULT_GROUP@@order", "p5vauYF1p+Aa7vuyDIgAMclMR5A="},
		{"DEFAULT_GROUP", ""}:      {"1700000000000", "yrSXpLiS52uwLdhoA7xjWG156jc="},
	} {
		headers := map[string]string{}
		sign(headers, goodAccess, goodSecret, k, at)
		if headers["ak"] != goodAccess || headers["data"] != want[0] || headers["signature"] != want[1] {
			t.Errorf("%v: %v", k, headers)
		}
	}
}

func TestSignedRequests(t *testing.T) {
	inSecret := []string{"nacosAccessKey", goodAccess, "nacosSecretKey", goodSecret}
	for name, c := range map[string]struct {
		entry, secret []string
		ok            bool
	}{
		"keys of the entry":             {[]string{goodAccess, goodSecret}, nil, true},
		"keys in the Secret":            {nil, inSecret, true},
		"the Secret's go first":         {[]string{goodAccess, "wrong-one"}, inSecret, true},
		"wrong":                         {[]string{goodAccess, "wrong-one"}, nil, false},
		"unknown":                       {[]string{"LTAI-other", goodSecret}, nil, false},
		"half of them":                  {[]string{goodAccess, ""}, nil, false},
		"half in each":                  {[]string{"", goodSecret}, []string{"nacosAccessKey", goodAccess}, false},
		"beside a user and a password":  {[]string{goodAccess, goodSecret}, []string{"nacosUsername", goodUser, "nacosPassword", goodPassword}, true},
		"wrong, and a user who is good": {[]string{"LTAI-other", "wrong-one"}, []string{"nacosUsername", goodUser, "nacosPassword", goodPassword}, true},
	} {
		t.Run(name, func(t *testing.T) {
			f, a, _ := withAuth(t, c.secret...)
			if c.entry != nil {
				a.accessKey, a.secretKey = c.entry[0], registry.Secret(c.entry[1])
			}
			_, err := a.instances(t.Context(), key{"DEFAULT_GROUP", "service-0000"})
			if err == nil {
				err = list(t, a)
			}
			switch {
			case c.ok && err != nil:
				t.Error(err)
			case !c.ok:
				refusedAs(t, err, "403")
				f.edit(func() {
					if len(f.seen) != 1 {
						t.Errorf("%d requests; there is nothing that could be tried again", len(f.seen))
					}
				})
			}
		})
	}
}

// TestAnswerRepeatsSecrets: a proxy may show what it was sent.
func TestAnswerRepeatsSecrets(t *testing.T) {
	f, a, _ := withAuth(t, "nacosUsername", goodUser, "nacosPassword", goodPassword)
	if err := list(t, a); err != nil {
		t.Fatal(err)
	}
	f.edit(func() {
		f.status[listPath], f.bodies[listPath] = 500, "failed: Authorization: Bearer token-0-of-"+goodUser
	})
	err := list(t, a)
	if err == nil {
		t.Fatal("no error")
	}
	showsNone(t, err.Error())
}

func TestSecretCannotBeRead(t *testing.T) {
	f := newHTTPFake(t)
	env := f.env()
	env.Credentials = func() (registry.Credentials, error) { return nil, errors.New("secret default/nacos is forbidden") }
	r := runHTTP(t, f.entry(), env)
	s := r.wait("a gap", func(s registrytest.State) bool { return s.Gap != nil })
	if s.Synced || !strings.Contains(s.Gap.Error(), "secret default/nacos is forbidden") {
		t.Errorf("synced %v, gap %v", s.Synced, s.Gap)
	}
	f.edit(func() {
		if len(f.seen) > 0 {
			t.Error("the server was asked without the credentials")
		}
	})
}
