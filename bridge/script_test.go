package bridge

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"
	networking "istio.io/api/networking/v1alpha3"

	"github.com/regbridge/regbridge/labels"
	"github.com/regbridge/regbridge/mcp/istio"
	"github.com/regbridge/regbridge/mcp/xds"
	"github.com/regbridge/regbridge/registry"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// TestIncidents runs the scripts in testdata: each is one incident, told as what registries say, the passing of time, and
// what the mesh must have then. testdata/README.md explains the commands.
func TestIncidents(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no scripts: %v", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txt"), func(t *testing.T) {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				defer w.stop()
				lines := bufio.NewScanner(bytes.NewReader(text))
				for n := 1; lines.Scan(); n++ {
					line, _, _ := strings.Cut(lines.Text(), "#")
					if line = strings.TrimSpace(line); line == "" {
						continue
					}
					w.where = fmt.Sprintf("%s:%d: %s", file, n, line)
					w.line(line)
				}
			})
		})
	}
}

// world is one bridge with scripted registries, and what its mesh has.
type world struct {
	t     *testing.T
	where string // the line that runs

	stateDir string
	config   Config
	configs  chan Config
	secrets  *fakeSecrets
	log      *syncBuffer

	bridge *Bridge
	mesh   *fakeMesh
	cancel context.CancelFunc
	done   chan error

	registries map[string]*scripted
	deadline   time.Duration
	dialect    istio.Dialect
	vipRange   netip.Prefix

	// Go tests may set these before start.
	renderer Renderer                      // in place of the dialect's
	wrap     func(Constructor) Constructor // of the scripted registries
	metrics  *prometheus.Registry          // made at start
}

func newWorld(t *testing.T) *world {
	return &world{
		t: t, stateDir: t.TempDir(), secrets: &fakeSecrets{m: map[string]registry.Credentials{}},
		log: &syncBuffer{}, registries: map[string]*scripted{}, config: Config{Read: true}, deadline: time.Minute, dialect: istio.Stock,
		mesh: &fakeMesh{resources: map[xds.Ref]xds.Resource{}},
	}
}

func (w *world) fatalf(format string, args ...any) {
	w.t.Helper()
	w.t.Fatalf("%s\n%s\nlog:\n%s", w.where, fmt.Sprintf(format, args...), w.log)
}

// Run implements Source.
func (w *world) Run(ctx context.Context, apply func(Config)) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case c := <-w.configs:
			apply(c)
		}
	}
}

func (w *world) start() {
	w.configs = make(chan Config)
	w.mesh.mu.Lock()
	w.mesh.open, w.mesh.next = false, nil
	w.mesh.mu.Unlock()
	renderer, construct := w.renderer, Constructor(w.construct)
	if renderer == nil {
		renderer = IstioRenderer{w.dialect}
	}
	if w.wrap != nil {
		construct = w.wrap(construct)
	}
	w.metrics = prometheus.NewRegistry()
	b, err := New(Options{
		Types: map[string]Constructor{"script": construct}, Source: w, Secrets: w.secrets, Mesh: w.mesh,
		Renderer: renderer, StateDir: w.stateDir,
		FirstAnswerDeadline: w.deadline, Coalesce: DefaultCoalesce, VIPRange: w.vipRange,
		Logger:     slog.New(slog.NewTextHandler(w.log, &slog.HandlerOptions{Level: slog.LevelDebug})),
		Registerer: w.metrics,
	})
	if err != nil {
		w.fatalf("%v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	w.bridge, w.cancel, w.done = b, cancel, make(chan error, 1)
	go func() { w.done <- b.Run(ctx) }()
	synctest.Wait()
}

func (w *world) stop() {
	if w.cancel == nil {
		return
	}
	w.cancel()
	if err := <-w.done; err != nil {
		w.fatalf("the bridge ended with %v", err)
	}
	w.cancel = nil
}

func (w *world) apply() {
	c := w.config
	c.Registries = slices.Clone(c.Registries)
	w.configs <- c
	synctest.Wait()
}

func (w *world) construct(e registry.Entry, env registry.Env) (registry.Registry, error) {
	if e.Domain == "bad" {
		return nil, registry.Fieldf("domain", "bad on purpose")
	}
	var warning error
	if e.Domain == "partly" {
		warning = &registry.FieldError{Path: "domain[1]", Err: errors.New("bad in part"), Partial: true}
	}
	s := w.registries[e.Name]
	if s == nil {
		s = &scripted{end: make(chan error)}
		w.registries[e.Name] = s
	}
	return &scriptedRun{s, env}, warning
}

// scripted is a registry that says what the script says.
type scripted struct {
	mu    sync.Mutex
	sink  registry.Sink // of the newest Run
	older registry.Sink // of the Run before
	runs  int
	end   chan error
	seen  registry.Credentials // at the start of the newest Run
}

type scriptedRun struct {
	*scripted
	env registry.Env
}

func (s *scriptedRun) Run(ctx context.Context, sink registry.Sink) error {
	credentials, err := s.env.Credentials()
	if err != nil {
		return err
	}
	s.mu.Lock()
	s.older, s.sink, s.seen = s.sink, sink, credentials
	s.runs++
	s.mu.Unlock()
	select {
	case <-ctx.Done():
		return nil
	case err := <-s.end:
		switch err.Error() {
		case "panic":
			panic("on purpose")
		case "nil":
			return nil
		case "config":
			return fmt.Errorf("scripted: %w", registry.ErrConfig)
		}
		return err
	}
}

type fakeSecrets struct {
	mu sync.Mutex
	m  map[string]registry.Credentials
}

func (f *fakeSecrets) Get(_, name string) (registry.Credentials, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if c, ok := f.m[name]; ok {
		return maps.Clone(c), nil
	}
	return nil, ErrSecretMissing
}

// fakeMesh is a client that has all resources.
type fakeMesh struct {
	mu        sync.Mutex
	resources map[xds.Ref]xds.Resource
	open      bool
	steps     int
	next      map[xds.Ref]xds.Resource // before open
}

func (m *fakeMesh) Apply(changed []xds.Resource, removed []xds.Ref) {
	m.mu.Lock()
	defer m.mu.Unlock()
	target := m.resources
	if !m.open {
		if m.next == nil {
			m.next = map[xds.Ref]xds.Resource{}
		}
		target = m.next
	}
	m.steps++
	for _, r := range changed {
		target[xds.Ref{Type: r.Type, Name: r.Name}] = r
	}
	for _, r := range removed {
		if _, ok := target[r]; !ok {
			panic("removed what is not there: " + r.Name)
		}
		delete(target, r)
	}
}

// made returns how many version steps were made since they were last counted anew.
func (m *fakeMesh) made(anew bool) int {
	m.mu.Lock()
	defer m.mu.Unlock()
	n := m.steps
	if anew {
		m.steps = 0
	}
	return n
}

// Open replaces what the client had by what is served now, as a state-of-the-world answer does.
func (m *fakeMesh) Open() {
	m.mu.Lock()
	defer m.mu.Unlock()
	same := maps.EqualFunc(m.resources, m.next, func(a, b xds.Resource) bool { return a.Version == b.Version })
	if !same {
		m.steps++
	} else {
		m.steps = 0
	}
	m.open = true
	if m.resources = m.next; m.resources == nil {
		m.resources = map[xds.Ref]xds.Resource{}
	}
	m.next = nil
}

// entry returns what the client has of a service.
func (m *fakeMesh) entry(host string) *networking.ServiceEntry {
	m.mu.Lock()
	defer m.mu.Unlock()
	r, ok := m.resources[xds.Ref{Type: istio.ServiceEntryKind, Name: "mcp/" + host}]
	if !ok {
		return nil
	}
	o, _, err := istio.Decode(r.Body)
	if err != nil {
		panic(err)
	}
	return o.Spec.(*networking.ServiceEntry)
}

// owner returns the name of the registry that the client is told of with a service.
func (m *fakeMesh) owner(host string) string {
	m.mu.Lock()
	defer m.mu.Unlock()
	o, _, err := istio.Decode(m.resources[xds.Ref{Type: istio.ServiceEntryKind, Name: "mcp/" + host}].Body)
	if err != nil {
		panic(err)
	}
	return o.Labels["higress-registry-name"]
}

type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// line runs one line: commands between semicolons, each once, or after "each FIRST-LAST" all of them once for each number,
// which stands for $. A word with {FIRST-LAST} becomes one word for each number.
func (w *world) line(line string) {
	w.t.Helper()
	numbers := []string{"$"}
	if rest, ok := strings.CutPrefix(line, "each "); ok {
		span, commands, _ := strings.Cut(rest, " ")
		numbers, line = expand("{"+span+"}"), commands
	}
	for _, n := range numbers {
		for command := range strings.SplitSeq(strings.ReplaceAll(line, "$", n), ";") {
			var words []string
			for word := range strings.FieldsSeq(command) {
				words = append(words, expand(word)...)
			}
			w.do(words)
		}
	}
}

// expand makes "a{1-3}" three words.
func expand(word string) []string {
	before, rest, ok := strings.Cut(word, "{")
	span, after, closed := strings.Cut(rest, "}")
	from, to, _ := strings.Cut(span, "-")
	if !ok || !closed {
		return []string{word}
	}
	var words []string
	for n := must(strconv.Atoi(from)); n <= must(strconv.Atoi(to)); n++ {
		words = append(words, before+strconv.Itoa(n)+after)
	}
	return words
}

// do runs one command.
func (w *world) do(words []string) {
	w.t.Helper()
	switch verb, args := words[0], words[1:]; verb {
	case "start":
		w.start()
	case "stop":
		w.stop()
	case "restart":
		w.stop()
		w.start()
		w.apply()
	case "dialect":
		w.dialect, _ = istio.ParseDialect(args[0], "higress-system")
	case "vip-range":
		w.vipRange = netip.MustParsePrefix(args[0])
	case "deadline":
		w.deadline = must(time.ParseDuration(args[0]))
	case "entry":
		w.entry(args)
	case "drop":
		w.config.Registries = slices.DeleteFunc(w.config.Registries, func(c RegistryConfig) bool { return c.Key.Name == args[0] })
	case "swap": // the order of two entries
		r := w.config.Registries
		i, j := w.index(args[0]), w.index(args[1])
		r[i], r[j] = r[j], r[i]
	case "unread":
		w.config.Read, w.config.Err = false, errors.New("no such folder")
	case "unreadable":
		w.config.Err = errors.New("no such folder")
	case "readable":
		w.config.Read, w.config.Err = true, nil
	case "apply":
		w.apply()
	case "secret":
		w.secrets.mu.Lock()
		if len(args) == 1 {
			delete(w.secrets.m, args[0])
		} else {
			k, v, _ := strings.Cut(args[1], "=")
			w.secrets.m[args[0]] = registry.Credentials{k: registry.Secret(v)}
		}
		w.secrets.mu.Unlock()
		if w.cancel != nil {
			w.bridge.SecretsChanged()
			synctest.Wait()
		}
	case "advance":
		time.Sleep(must(time.ParseDuration(args[0])))
		synctest.Wait()
	case "release":
		if _, err := w.bridge.Release(args[0]); err != nil {
			w.fatalf("%v", err)
		}
	case "quiet": // nothing was sent to the mesh since the last `mark`
		w.settle()
		if n := w.mesh.made(false); n != 0 {
			w.fatalf("%d version steps were made", n)
		}
	case "steps": // at most so many since the last mark
		w.settle()
		if n := w.mesh.made(false); n > must(strconv.Atoi(args[0])) {
			w.fatalf("%d version steps were made", n)
		}
	case "mark":
		w.settle()
		w.mesh.made(true)
	case "ready":
		w.settle()
		if ready, why := w.bridge.Ready(); ready != (args[0] == "yes") {
			w.fatalf("ready is %v: %v", ready, why)
		} else if text := strings.Join(args[1:], " "); !strings.Contains(strings.Join(why, "; "), text) {
			w.fatalf("the reasons are %q", why)
		}
	case "logged":
		if !strings.Contains(w.log.String(), strings.Join(args, " ")) {
			w.fatalf("not logged")
		}
	case "unlogged":
		if strings.Contains(w.log.String(), strings.Join(args, " ")) {
			w.fatalf("logged")
		}
	case "damage": // every snapshot
		for _, f := range must(filepath.Glob(w.stateDir + "/*.snapshot")) {
			content := must(os.ReadFile(f))
			content[len(content)/2] ^= 1
			if err := os.WriteFile(f, content, 0o600); err != nil {
				w.fatalf("%v", err)
			}
		}
	case "expect":
		w.expect(args[0], args[1:])
	case "absent":
		w.settle()
		if e := w.mesh.entry(args[0]); e != nil {
			w.fatalf("the mesh has %v", e)
		}
	case "port":
		w.settle()
		if e := w.mesh.entry(args[0]); e == nil || fmt.Sprint(e.Ports[0].Number) != args[1] || e.Ports[0].Protocol != args[2] {
			w.fatalf("the mesh has %v", e)
		}
	case "label": // label HOST ADDRESS KEY VALUE
		w.settle()
		e := w.mesh.entry(args[0])
		i := slices.IndexFunc(e.GetEndpoints(), func(we *networking.WorkloadEntry) bool { return we.Address == args[1] })
		if i < 0 || e.Endpoints[i].Labels[args[2]] != strings.Join(args[3:], " ") {
			w.fatalf("the mesh has %v", e)
		}
	case "resolution":
		w.settle()
		if e := w.mesh.entry(args[0]); e == nil || e.Resolution.String() != args[1] {
			w.fatalf("the mesh has %v", e)
		}
	case "owner": // owner HOST NAME: the registry that the resource names
		w.settle()
		if got := w.mesh.owner(args[0]); got != args[1] {
			w.fatalf("the mesh has registry %q", got)
		}
	case "locality": // locality HOST ADDRESS REGION/ZONE
		w.settle()
		e := w.mesh.entry(args[0])
		i := slices.IndexFunc(e.GetEndpoints(), func(we *networking.WorkloadEntry) bool { return we.Address == args[1] })
		if i < 0 || e.Endpoints[i].Locality != args[2] {
			w.fatalf("the mesh has %v", e)
		}
	case "distinct": // distinct HOST...: each has a virtual address of its own
		w.settle()
		seen := map[string]bool{}
		for _, host := range args {
			e := w.mesh.entry(host)
			if len(e.GetAddresses()) != 1 || seen[e.Addresses[0]] {
				w.fatalf("the mesh has %v", e)
			}
			seen[e.Addresses[0]] = true
		}
	case "address": // a virtual address, or none
		w.settle()
		if e := w.mesh.entry(args[0]); e == nil || (len(e.Addresses) == 1) != (args[1] == "yes") {
			w.fatalf("the mesh has %v", e)
		}
	case "tls": // tls HOST SNI: a DestinationRule says so; tls HOST - : there is none
		w.tls(args[0], args[1])
	case "state":
		w.state(args[0], args[1:])
	case "runs":
		s := w.registries[args[0]]
		s.mu.Lock()
		n := s.runs
		s.mu.Unlock()
		if strconv.Itoa(n) != args[1] {
			w.fatalf("%d runs", n)
		}
	case "credentials":
		s := w.registries[args[0]]
		s.mu.Lock()
		defer s.mu.Unlock()
		k, v, _ := strings.Cut(args[1], "=")
		if s.seen[k].Reveal() != v {
			w.fatalf("the adapter began with other credentials")
		}
	default:
		if w.index(verb) < 0 && w.registries[verb] == nil {
			w.fatalf("unknown command")
		}
		w.say(verb, args)
	}
}

// settle waits until what is known is published.
func (w *world) settle() {
	time.Sleep(DefaultCoalesce + time.Millisecond)
	synctest.Wait()
}

func (w *world) index(name string) int {
	return slices.IndexFunc(w.config.Registries, func(c RegistryConfig) bool { return c.Key.Name == name })
}

// entry adds an entry, or replaces the one with its name: entry NAME [domain=.] [settle=.] [hold=.] [off] [protocol=.]
// [vport=.] [vport:HOST=.] [secret=.] [interval=.] [invalid=MESSAGE].
func (w *world) entry(args []string) {
	c := RegistryConfig{
		Key: Key{"default", "bridge", "script", args[0]}, Entry: registry.Entry{Type: "script", Name: args[0]},
		Path: "spec.registries[0]", Origin: "bridge.yaml:1",
	}
	for _, a := range args[1:] {
		k, v, _ := strings.Cut(a, "=")
		guard := func() *registry.Guard {
			if c.Entry.Guard == nil {
				c.Entry.Guard = &registry.Guard{}
			}
			return c.Entry.Guard
		}
		vport := func() *registry.VPort {
			if c.Entry.VPort == nil {
				c.Entry.VPort = &registry.VPort{}
			}
			return c.Entry.VPort
		}
		switch name, host, _ := strings.Cut(k, ":"); {
		case k == "domain":
			c.Entry.Domain = v
		case k == "settle":
			guard().Settle = registry.Interval(must(time.ParseDuration(v)))
		case k == "hold":
			guard().Hold = registry.Interval(must(time.ParseDuration(v)))
		case k == "off":
			guard().Off = true
		case k == "protocol":
			c.Entry.Protocol = v
		case k == "secret":
			c.Entry.AuthSecretName = v
		case k == "interval":
			c.Entry.RefreshInterval = registry.Interval(must(time.ParseDuration(v)))
		case k == "invalid":
			c.Err = errors.New(v)
		case name == "vport" && host == "":
			vport().Default = uint32(must(strconv.Atoi(v)))
		case name == "vport":
			vport().Services = append(vport().Services, registry.VPortService{Name: host, Value: uint32(must(strconv.Atoi(v)))})
		default:
			w.fatalf("unknown setting %s", a)
		}
	}
	if i := w.index(args[0]); i >= 0 {
		w.config.Registries[i] = c
		return
	}
	w.config.Registries = append(w.config.Registries, c)
}

// say makes a registry say something: NAME put ID[@HOST] [port=N] [sni=.] INSTANCE... | delete ID | synced ID... |
// fail [ID...] | end MESSAGE|panic|nil|config | old put... (by the Run before the newest).
func (w *world) say(name string, args []string) {
	s := w.registries[name]
	if s == nil {
		w.fatalf("registry %s does not run", name)
	}
	s.mu.Lock()
	sink, older := s.sink, s.older
	s.mu.Unlock()
	if args[0] != "end" && sink == nil {
		w.fatalf("registry %s does not run", name)
	}
	if args[0] == "old" {
		if args = args[1:]; older == nil {
			w.fatalf("registry %s had one Run only", name)
		}
		sink = older
	}
	switch args[0] {
	case "put":
		sink.Put(w.service(args[1], args[2:]))
	case "delete":
		sink.Delete(args[1])
	case "synced":
		sink.Synced(args[1:])
	case "fail":
		sink.Fail(errors.New("scripted failure"), args[1:]...)
	case "end":
		s.end <- errors.New(strings.Join(args[1:], " "))
	default:
		w.fatalf("unknown saying")
	}
	synctest.Wait()
}

// service reads ID[@HOST] and instances: ADDRESS:PORT[,w=N][,unhealthy][,disabled][,proto=P][,zone=Z][,KEY=VALUE].
// ADDRESS:PORT with a range 10.0.0.1-20:80 stands for several.
func (w *world) service(name string, words []string) registry.Service {
	id, host, ok := strings.Cut(name, "@")
	if !ok {
		host = id + ".script"
	}
	s := registry.Service{ID: id, Host: host}
	for _, word := range words {
		if v, ok := strings.CutPrefix(word, "port="); ok {
			s.Port = uint32(must(strconv.Atoi(v)))
			continue
		}
		if v, ok := strings.CutPrefix(word, "sni="); ok {
			s.TLS = &registry.ClientTLS{SNI: v}
			continue
		}
		parts := strings.Split(word, ",")
		i := registry.Instance{Weight: 1}
		metadata := map[string]string{}
		for _, p := range parts[1:] {
			switch k, v, _ := strings.Cut(p, "="); k {
			case "w":
				i.Weight = must(strconv.ParseFloat(v, 64))
			case "unhealthy":
				i.Unhealthy, i.Reason = true, "check failed"
			case "disabled":
				i.Disabled = true
			case "proto":
				i.Protocol = v
			case "zone":
				i.Locality.Zone, i.Locality.Region = v, "r"
			default:
				metadata[k] = v
			}
		}
		i.Metadata = labels.FromMap(metadata)
		colon := strings.LastIndexByte(parts[0], ':')
		i.Port = uint32(must(strconv.Atoi(parts[0][colon+1:])))
		for _, a := range addresses(parts[0][:colon]) {
			i.Address = a
			s.Instances = append(s.Instances, i)
		}
	}
	return s
}

// addresses expands 10.0.0.1-3 to three addresses.
func addresses(text string) []string {
	dash, dot := strings.LastIndexByte(text, '-'), strings.LastIndexByte(text, '.')
	if dash < dot || dot < 0 {
		return []string{text}
	}
	first, err := strconv.Atoi(text[dot+1 : dash])
	last, err2 := strconv.Atoi(text[dash+1:])
	if err != nil || err2 != nil {
		return []string{text}
	}
	var all []string
	for n := first; n <= last; n++ {
		all = append(all, text[:dot+1]+strconv.Itoa(n))
	}
	return all
}

// expect compares what the mesh has of a service: expect HOST ADDRESS:PORT[=WEIGHT]... or expect HOST none. A port that is
// the service's may be left out.
func (w *world) expect(host string, want []string) {
	w.t.Helper()
	w.settle()
	e := w.mesh.entry(host)
	if e == nil {
		w.fatalf("the mesh does not have %s", host)
	}
	var got []string
	for _, we := range e.Endpoints {
		port := e.Ports[0].Number
		if p, ok := we.Ports[e.Ports[0].Name]; ok {
			port = p
		}
		g := fmt.Sprintf("%s:%d", we.Address, port)
		if we.Weight != 0 {
			g += fmt.Sprintf("=%d", we.Weight)
		}
		got = append(got, g)
	}
	var all []string
	for _, item := range want {
		if item == "none" {
			continue
		}
		colon := strings.LastIndexByte(item, ':')
		for _, a := range addresses(item[:colon]) {
			all = append(all, a+item[colon:])
		}
	}
	slices.Sort(got)
	slices.Sort(all)
	if !slices.Equal(got, all) {
		w.fatalf("the mesh has %v", got)
	}
}

func (w *world) tls(host, sni string) {
	w.settle()
	var got []string
	w.mesh.mu.Lock()
	resources := maps.Clone(w.mesh.resources)
	w.mesh.mu.Unlock()
	for ref, r := range resources {
		if ref.Type != istio.DestinationRuleKind {
			continue
		}
		o, _, err := istio.Decode(r.Body)
		if err != nil {
			w.fatalf("%v", err)
		}
		rule := o.Spec.(*networking.DestinationRule)
		if rule.Host == host {
			got = append(got, rule.TrafficPolicy.PortLevelSettings[0].Tls.Sni)
		}
	}
	if want := []string{sni}; sni == "-" && len(got) > 0 || sni != "-" && !slices.Equal(got, want) {
		w.fatalf("the mesh has rules with %q", got)
	}
}

// state compares a registry's status: state NAME STATE [held=N] [published=N] [left=REASON:N] [stale] [fresh] [error].
func (w *world) state(name string, want []string) {
	w.settle()
	all := w.bridge.Statuses()
	i := slices.IndexFunc(all, func(s Status) bool { return s.Name == name })
	if i < 0 {
		w.fatalf("no status")
	}
	s := all[i]
	for _, word := range want {
		k, v, _ := strings.Cut(word, "=")
		var ok bool
		switch k {
		case "held":
			ok = strconv.Itoa(s.Held) == v && len(s.HeldEndpoints) == s.Held
		case "published":
			ok = strconv.Itoa(s.Published) == v
		case "services":
			ok = strconv.Itoa(s.Services) == v
		case "left":
			reason, n, _ := strings.Cut(v, ":")
			ok = strconv.Itoa(s.LeftOut[Reason(reason)]) == n
		case "stale", "fresh":
			ok = s.Stale == (k == "stale")
		case "error":
			ok = s.LastError != "" || s.ConfigError != ""
			ok = ok && strings.Contains(s.LastError+s.ConfigError, v)
		case "failed":
			ok = s.FailedServices[v] != ""
		case "nofailed":
			ok = len(s.FailedServices) == 0
		case "age": // of the last complete reading, in whole seconds
			ok = s.LastSync != nil && time.Since(*s.LastSync).Truncate(time.Second) == must(time.ParseDuration(v))
		case "warned":
			ok = len(s.Warnings) > 0
		case "noerror":
			ok = s.LastError == "" && s.ConfigError == ""
		default:
			ok = string(s.State) == k
		}
		if !ok {
			w.fatalf("%s: status is %+v", word, s)
		}
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}
