package eureka

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/regbridge/regbridge/labels"
	"github.com/regbridge/regbridge/registry"
)

func auto() choice { return choice{secure: secureAuto} }

func read(t testing.TB, c choice, body string) *answer {
	t.Helper()
	a, err := decode(strings.NewReader(body), c, func() {})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// facts shows the instances of an answer, one a line.
func facts(a *answer) []string {
	var out []string
	for _, app := range slices.Sorted(maps.Keys(a.apps)) {
		for _, r := range a.apps[app] {
			out = append(out, fmt.Sprintf("%s/%s %s", app, r.id, show(r.fact)))
		}
		if len(a.apps[app]) == 0 {
			out = append(out, app)
		}
	}
	return out
}

func show(i registry.Instance) string {
	s := fmt.Sprintf("%s:%d", i.Address, i.Port)
	if i.Protocol != "" {
		s = i.Protocol + "://" + s
	}
	if i.Weight != 1 {
		s += fmt.Sprintf(" weight=%v", i.Weight)
	}
	if i.Disabled {
		s += " disabled"
	}
	if i.Unhealthy {
		s += " unhealthy"
	}
	if i.Reason != "" {
		s += fmt.Sprintf(" %q", i.Reason)
	}
	if l := i.Locality.String(); l != "" {
		s += " at " + l
	}
	for k, v := range i.Metadata.All() {
		s += fmt.Sprintf(" %s=%q", k, v)
	}
	return s
}

// TestSamples reads what a real server answered.
func TestSamples(t *testing.T) {
	const (
		orders1 = `ORDERS/i1.example:orders:8080 10.1.2.3:8080 weight=10 at /z1 empty="" flag="true" istio.protocol="grpc" version="v1" weight="10" zone="z1"`
		orders2 = `ORDERS/i2.example:orders:8080 10.1.2.4:8080 weight=5 at /z2 weight="5" zone="z2"`
		changed = `at /z1 empty="" extra="1" flag="true" istio.protocol="grpc" version="v1" weight="10" zone="z1"`
		over    = `ORDERS/i1.example:orders:8080 10.1.2.3:8080 weight=10 disabled "status OUT_OF_SERVICE" ` + changed
	)
	for file, want := range map[string]struct {
		hash  string
		facts []string
	}{
		"apps-empty.json":    {"", nil},
		"apps-1.json":        {"UP_1_", []string{orders1}},
		"apps-2.json":        {"UP_2_", []string{orders1, orders2}},
		"apps-override.json": {"OUT_OF_SERVICE_1_UP_1_", []string{over, orders2}},
		"amazon-down.json":   {"DOWN_1_", []string{`AWS/aws1 10.0.0.1:7001 unhealthy "status DOWN" at us-east-1/us-east-1a`}},
		"cluster-node2-apps.json": {"UP_2_", []string{
			`EUREKA/192.0.2.2:eureka:18761 192.0.2.2:18761 management.port="18761"`, orders1,
		}},
		"real-client-apps.json": {"UP_1_", []string{
			`ORDER-SERVICE/192.0.2.2:order-service:18091 127.0.0.1:18091 at /z1 management.port="18091" version="v1" zone="z1"`,
		}},
		"edge.json": {"STARTING_1_UNKNOWN_1_UP_2_", []string{
			`NOID2/hn:7070 10.0.0.1:7070 unhealthy "status STARTING"`,
			`NOMETA/nm:1 10.0.0.1:7001`,
			`NOMETA2/nm:2 10.0.0.1:7001 b="true" f="1.5" n="10" u="é<&>\"" z="null"`,
			`STATUS/nm:4 10.0.0.1:7001 unhealthy "status UNKNOWN"`,
		}},
		"delta.json":           {"UP_2_", []string{orders1, orders2}},
		"delta-override.json":  {"OUT_OF_SERVICE_1_UP_1_", []string{over, orders2}},
		"delta-after-del.json": {"UP_1_", []string{`ORDERS/i1.example:orders:8080 10.1.2.3:8080 weight=10 ` + changed, orders2}},
	} {
		t.Run(file, func(t *testing.T) {
			body, err := os.ReadFile(filepath.Join("testdata", file))
			if err != nil {
				t.Fatal(err)
			}
			a := read(t, auto(), string(body))
			if diff := cmp.Diff(want.facts, facts(a)); diff != "" || a.hash != want.hash || a.odd != 0 {
				t.Errorf("counts %q, %d odd elements: -want +got %s", a.hash, a.odd, diff)
			}
			if !strings.HasPrefix(file, "delta") {
				k := newKnown()
				if k.replace(a); k.hash() != want.hash {
					t.Errorf("counted %q, the server %q", k.hash(), want.hash)
				}
			}
		})
	}
}

// TestSampleDeltas merges what a real server answered, one after the other, each twice.
func TestSampleDeltas(t *testing.T) {
	load := func(file string) *answer {
		body, err := os.ReadFile(filepath.Join("testdata", file))
		if err != nil {
			t.Fatal(err)
		}
		return read(t, auto(), string(body))
	}
	k := newKnown()
	k.replace(load("apps-1.json"))
	for _, step := range [][2]string{
		{"delta.json", "apps-2.json"}, {"delta-override.json", "apps-override.json"}, {"delta-after-del.json", "apps-after-del.json"},
	} {
		for range 2 {
			d := load(step[0])
			k.apply(d)
			if k.hash() != d.hash {
				t.Errorf("%s leads to %s, not %s", step[0], k.hash(), d.hash)
			}
			full := load(step[1])
			if diff := cmp.Diff(facts(full), facts(&answer{apps: k.apps})); diff != "" {
				t.Errorf("%s: -full +delta %s", step[0], diff)
			}
		}
	}
}

// apps makes an answer with one application of these instances.
func apps(instances ...string) string {
	return `{"applications":{"versions__delta":"1","apps__hashcode":"UP_1_","application":[{"name":"A","instance":[` +
		strings.Join(instances, ",") + `]}]}}`
}

// TestSpellings is about what other servers write.
func TestSpellings(t *testing.T) {
	const (
		one  = `{"instanceId":"i","ipAddr":"10.0.0.1","status":"UP","port":{"$":80,"@enabled":"true"}}`
		want = `A/i 10.0.0.1:80`
	)
	for name, tc := range map[string]struct{ body, want string }{
		"as it should be":     {apps(one), want},
		"one object for all":  {`{"applications":{"application":{"name":"A","instance":` + one + `}}}`, want},
		"the name comes last": {`{"applications":{"application":{"instance":[` + one + `],"name":"A"}}}`, want},
		"the name is the instance's": {
			`{"applications":{"application":[{"instance":{"app":"A","instanceId":"i","ipAddr":"10.0.0.1","status":"UP","port":{"$":80}}}]}}`, want,
		},
		"an application in two parts": {
			`{"applications":{"application":[{"name":"A","instance":[` + one + `]},{"name":"A","instance":null}]}}`, want,
		},
		"null for a list":             {`{"applications":{"apps__hashcode":"","application":null}}`, ""},
		"no list":                     {`{"applications":{"versions__delta":1,"apps__hashcode":""}}`, ""},
		"an empty text for a list":    {`{"applications":{"application":""}}`, ""},
		"an application without list": {`{"applications":{"application":[{"name":"A"}]}}`, "A"},
		"other fields":                {`{"x":[{"a":1e999}],"applications":{"y":{"z":[]},"application":[{"name":"A","q":[1],"instance":[` + one + `]}]},"w":null}`, want},
		"texts for numbers":           {apps(`{"instanceId":"i","ipAddr":"10.0.0.1","status":"UP","port":{"$":"80","@enabled":true},"leaseInfo":{"registrationTimestamp":"12"}}`), want},
		"numbers for texts":           {apps(`{"instanceId":7,"ipAddr":"10.0.0.1","status":"UP","port":{"$":80.0}}`), `A/7 10.0.0.1:80`},
		"the port alone":              {apps(`{"instanceId":"i","ipAddr":"10.0.0.1","status":"UP","port":80,"securePort":443}`), want},
		"lower case":                  {apps(`{"instanceid":"i","ipaddr":"10.0.0.1","status":"up","port":{"$":80},"overriddenstatus":"UNKNOWN"}`), want},
		"nulls": {
			apps(`{"instanceId":"i","ipAddr":"10.0.0.1","status":"UP","port":{"$":80,"@enabled":null},"securePort":null,"metadata":null,` +
				`"dataCenterInfo":null,"leaseInfo":null,"lastDirtyTimestamp":null,"actionType":null}`), want,
		},
		"other types": {
			apps(`{"instanceId":"i","ipAddr":"10.0.0.1","status":"UP","port":{"$":80,"@enabled":{}},"securePort":"x","metadata":"none",` +
				`"dataCenterInfo":"MyOwn","leaseInfo":[1],"lastDirtyTimestamp":{"a":1},"actionType":[]}`), want,
		},
		"metadata of all types": {
			apps(`{"instanceId":"i","ipAddr":"10.0.0.1","status":"UP","port":{"$":80},"metadata":{"n":10,"b":true,"nul":null,"o":{"x":1},"@class":"x","s":"\u00e4\"","":"e"}}`),
			want + ` ="e" b="true" n="10" nul="" o="" s="ä\""`,
		},
		"elements that are none":       {apps(`null`, `3`, `"x"`, `[1]`, one, `{}`), "A/:0 :0 disabled \"both its ports are disabled\"\n" + want},
		"applications that are none":   {`{"applications":{"application":[null,3,"x",{"name":"A","instance":[` + one + `]}]}}`, want},
		"an application without name":  {`{"applications":{"application":[{"instance":[` + one + `]}]}}`, ""},
		"the same twice, the last one": {apps(strings.Replace(one, "10.0.0.1", "10.0.0.9", 1), one), want},
		"the same twice, the later one": {
			apps(strings.Replace(one, `"UP"`, `"UP","lastUpdatedTimestamp":"2"`, 1), strings.Replace(one, `10.0.0.1"`, `10.0.0.9","lastUpdatedTimestamp":"1"`, 1)), want,
		},
	} {
		t.Run(name, func(t *testing.T) {
			if got := strings.Join(facts(read(t, auto(), tc.body)), "\n"); got != tc.want {
				t.Errorf("got\n%s\nwant\n%s", got, tc.want)
			}
		})
	}
}

func TestInstance(t *testing.T) {
	for name, tc := range map[string]struct {
		choice choice
		fields string
		want   string
	}{
		"UP":                                {auto(), `"ipAddr":"10.0.0.1","status":"UP","port":{"$":80,"@enabled":"true"}`, `10.0.0.1:80`},
		"DOWN":                              {auto(), `"ipAddr":"10.0.0.1","status":"DOWN","port":{"$":80}`, `10.0.0.1:80 unhealthy "status DOWN"`},
		"STARTING":                          {auto(), `"ipAddr":"10.0.0.1","status":"STARTING","port":{"$":80}`, `10.0.0.1:80 unhealthy "status STARTING"`},
		"no status":                         {auto(), `"ipAddr":"10.0.0.1","port":{"$":80}`, `10.0.0.1:80 unhealthy "has no status"`},
		"out of service":                    {auto(), `"ipAddr":"10.0.0.1","status":"OUT_OF_SERVICE","port":{"$":80}`, `10.0.0.1:80 disabled "status OUT_OF_SERVICE"`},
		"the status is folded":              {auto(), `"ipAddr":"10.0.0.1","status":"UP","overriddenStatus":"OUT_OF_SERVICE","port":{"$":80}`, `10.0.0.1:80`},
		"auto, both ports":                  {auto(), `"ipAddr":"10.0.0.1","status":"UP","port":{"$":80,"@enabled":"true"},"securePort":{"$":443,"@enabled":"true"}`, `10.0.0.1:80`},
		"auto, the secure one":              {auto(), `"ipAddr":"10.0.0.1","status":"UP","port":{"$":80,"@enabled":"false"},"securePort":{"$":443,"@enabled":"true"}`, `https://10.0.0.1:443`},
		"auto, the secure one without flag": {auto(), `"ipAddr":"10.0.0.1","status":"UP","port":{"$":80,"@enabled":false},"securePort":{"$":443}`, `10.0.0.1:80 disabled "both its ports are disabled"`},
		"auto, port 0":                      {auto(), `"ipAddr":"10.0.0.1","status":"UP","port":{"$":0,"@enabled":"true"},"securePort":{"$":443,"@enabled":true}`, `https://10.0.0.1:443`},
		"always":                            {choice{secure: secureAlways}, `"ipAddr":"10.0.0.1","status":"UP","port":{"$":80},"securePort":{"$":443,"@enabled":"true"}`, `https://10.0.0.1:443`},
		"always, and it has none":           {choice{secure: secureAlways}, `"ipAddr":"10.0.0.1","status":"UP","port":{"$":80},"securePort":{"$":443,"@enabled":"false"}`, `https://10.0.0.1:443 disabled "its secure port is disabled, and eurekaSecure is always"`},
		"never":                             {choice{secure: secureNever}, `"ipAddr":"10.0.0.1","status":"UP","port":{"$":80},"securePort":{"$":443,"@enabled":"true"}`, `10.0.0.1:80`},
		"never, and it has only that":       {choice{secure: secureNever}, `"ipAddr":"10.0.0.1","status":"UP","port":{"$":80,"@enabled":"false"},"securePort":{"$":443,"@enabled":"true"}`, `10.0.0.1:80 disabled "only its secure port is enabled, and eurekaSecure is never"`},
		"no port is one":                    {auto(), `"ipAddr":"10.0.0.1","status":"UP","port":{"$":-1}`, `10.0.0.1:4294967295`},
		"no address":                        {auto(), `"hostName":"a.example","ipAddr":"","status":"UP","port":{"$":80}`, `a.example:80`},
		"an address of everything":          {auto(), `"hostName":"a.example","ipAddr":"0.0.0.0","status":"UP","port":{"$":80}`, `a.example:80`},
		"a name for an address":             {auto(), `"hostName":"a.example","ipAddr":"b.example","status":"UP","port":{"$":80}`, `b.example:80`},
		"v6":                                {auto(), `"hostName":"a.example","ipAddr":"[2001:DB8::1%eth0]","status":"UP","port":{"$":80}`, `2001:db8::1:80`},
		"the name is preferred":             {choice{secure: secureAuto, hostName: true}, `"hostName":"a.example","ipAddr":"10.0.0.1","status":"UP","port":{"$":80}`, `a.example:80`},
		"the name is preferred, no name":    {choice{secure: secureAuto, hostName: true}, `"ipAddr":"10.0.0.1","status":"UP","port":{"$":80}`, `10.0.0.1:80`},
		"weight":                            {auto(), `"ipAddr":"10.0.0.1","status":"UP","port":{"$":80},"metadata":{"weight":"2.5"}`, `10.0.0.1:80 weight=2.5 weight="2.5"`},
		"no traffic":                        {auto(), `"ipAddr":"10.0.0.1","status":"UP","port":{"$":80},"metadata":{"weight":0}`, `10.0.0.1:80 weight=0 weight="0"`},
		"no weight":                         {auto(), `"ipAddr":"10.0.0.1","status":"UP","port":{"$":80},"metadata":{"weight":"heavy"}`, `10.0.0.1:80 weight="heavy"`},
		"not a number":                      {auto(), `"ipAddr":"10.0.0.1","status":"UP","port":{"$":80},"metadata":{"weight":"NaN"}`, `10.0.0.1:80 weight="NaN"`},
		"negative":                          {auto(), `"ipAddr":"10.0.0.1","status":"UP","port":{"$":80},"metadata":{"weight":"-1"}`, `10.0.0.1:80 weight="-1"`},
		"Amazon's zone goes before":         {auto(), `"ipAddr":"10.0.0.1","status":"UP","port":{"$":80},"dataCenterInfo":{"metadata":{"availability-zone":"eu-west-1c"}},"metadata":{"zone":"z"}`, `10.0.0.1:80 at eu-west-1/eu-west-1c zone="z"`},
		"a zone of somebody else":           {auto(), `"ipAddr":"10.0.0.1","status":"UP","port":{"$":80},"dataCenterInfo":{"metadata":{"availability-zone":"rack"}}`, `10.0.0.1:80 at /rack`},
	} {
		t.Run(name, func(t *testing.T) {
			a := read(t, tc.choice, apps(`{"instanceId":"i",`+tc.fields+`}`))
			if got := show(a.apps["A"][0].fact); got != tc.want {
				t.Errorf("got\n%s\nwant\n%s", got, tc.want)
			}
		})
	}
}

func TestID(t *testing.T) {
	for fields, want := range map[string]string{
		`"instanceId":"i","hostName":"h","dataCenterInfo":{"metadata":{"instance-id":"aws"}},"port":{"$":80}`: "i",
		`"hostName":"h","dataCenterInfo":{"metadata":{"instance-id":"aws"}},"port":{"$":80}`:                  "aws",
		`"hostName":"h","ipAddr":"10.0.0.1","port":{"$":80}`:                                                  "h:80",
		`"ipAddr":"10.0.0.1","port":{"$":80}`:                                                                 "10.0.0.1:80",
	} {
		if got := read(t, auto(), apps(`{`+fields+`}`)).apps["A"][0].id; got != want {
			t.Errorf("%s: %q, want %q", fields, got, want)
		}
	}
}

func TestHost(t *testing.T) {
	if got := hostOf("EUREKA-REGISTRY-PROVIDER"); got != "EUREKA-REGISTRY-PROVIDER.eureka" {
		t.Error(got)
	}
}

func TestTooMany(t *testing.T) {
	d := &decoder{
		Decoder: json.NewDecoder(strings.NewReader(apps(`{}`, `{}`, `{}`))), answer: answer{apps: map[string][]record{}}, next: func() {}, most: 2,
	}
	if _, err := d.decode(); err == nil || !strings.Contains(err.Error(), "more than 2") {
		t.Errorf("the error is %v", err)
	}
}

// FuzzDecode checks that what is taken of an answer can be counted, merged and reported, whatever it is.
func FuzzDecode(f *testing.F) {
	files, err := filepath.Glob("testdata/*.json")
	if err != nil {
		f.Fatal(err)
	}
	for _, file := range files {
		body, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(body)
	}
	f.Add([]byte(apps(`null`, `{"port":{"$":"x"},"metadata":{"a":{}}}`, `{"actionType":"DELETED","instanceId":"i"}`)))
	f.Fuzz(func(t *testing.T, body []byte) {
		a, err := decode(strings.NewReader(string(body)), auto(), func() {})
		if err != nil {
			return
		}
		if !json.Valid(body) {
			t.Errorf("taken, and no JSON: %q", body)
		}
		k := newKnown()
		k.apply(a)
		once := k.hash()
		if k.apply(a); k.hash() != once {
			t.Error("applied twice is another state")
		}
		same, err := decode(strings.NewReader(string(body)), auto(), func() {})
		if err != nil {
			t.Fatal(err)
		}
		full := newKnown()
		full.replace(same)
		if len(full.lost(a)) != 0 {
			t.Error("lost something to itself")
		}
		for _, s := range full.changed(true) {
			if s.ID == "" || s.Host == "" {
				t.Errorf("service without id or host: %+v", s)
			}
			for _, i := range s.Instances {
				if i.Weight < 0 || i.Metadata == labels.FromMap(map[string]string{"@class": "x"}) {
					t.Errorf("%+v", i)
				}
			}
		}
	})
}

// TestEmptyApplicationsAreBounded: they cost memory too.
func TestEmptyApplicationsAreBounded(t *testing.T) {
	var body strings.Builder
	body.WriteString(`{"applications":{"apps__hashcode":"","application":[{}`)
	for range maxInstances {
		body.WriteString(",{}")
	}
	body.WriteString("]}}")
	if _, err := decode(strings.NewReader(body.String()), choice{}, func() {}); err == nil || !strings.Contains(err.Error(), "applications without instances") {
		t.Errorf("the error is %v", err)
	}
}
