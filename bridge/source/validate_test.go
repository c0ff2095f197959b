package source

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/regbridge/regbridge/bridge"
	"github.com/regbridge/regbridge/registry"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// check stands for the constructors.
func check(rc bridge.RegistryConfig) error {
	switch rc.Key.Type {
	case "checked":
		_, err := registry.ParseServers("domain", strings.ReplaceAll(rc.Entry.Domain, "bad", "ht tp"), 0)
		if rc.Entry.VPort != nil {
			err = errors.Join(err, registry.Fieldf("vport.services[0].value", "99 is taken"))
		}
		if rc.Entry.Port == 0 {
			err = errors.Join(err, fmt.Errorf("checked: %w", registry.Fieldf("port", "a port is needed")))
		}
		return err
	case "unknown":
		return errors.New("there is no such type")
	}
	return nil
}

// text writes problems one a line, as regbridge validate would.
func text(problems []bridge.Problem) string {
	var b strings.Builder
	for _, p := range problems {
		if p.Warning {
			b.WriteString("warning: ")
		}
		b.WriteString(Text(p) + "\n")
	}
	return b.String()
}

func golden(t *testing.T, path, got string) {
	t.Helper()
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s (-want +got, -update rewrites):\n%s", path, diff)
	}
}

func TestValidate(t *testing.T) {
	files, err := configFiles("testdata/validate")
	if err != nil || len(files) == 0 {
		t.Fatal("no test data", err)
	}
	for _, path := range files {
		t.Run(filepath.Base(path), func(t *testing.T) {
			got := text(Validate([]string{path}, ValidateOptions{Check: check}))
			golden(t, strings.TrimSuffix(path, filepath.Ext(path))+".problems", got)
			for _, secret := range []string{"hunter2", "12345678"} {
				if strings.Contains(got, secret) {
					t.Errorf("a secret is printed: %s", got)
				}
			}
		})
	}
}

// The file with all fields has all fields, so that it also proves that those to come are read.
func TestAllFieldsAreRead(t *testing.T) {
	data, err := os.ReadFile("testdata/validate/all-fields.yaml")
	if err != nil {
		t.Fatal(err)
	}
	docs, problems := Parse("f", data, true)
	if len(problems) > 0 || len(docs) != 1 {
		t.Fatal(len(docs), text(problems))
	}
	var zero func(v reflect.Value, path string)
	zero = func(v reflect.Value, path string) {
		switch {
		case v.Kind() == reflect.Struct:
			for i := range v.NumField() {
				zero(v.Field(i), path+"."+v.Type().Field(i).Name)
			}
		case v.IsZero():
			t.Errorf("%s is not set", path)
		case v.Kind() == reflect.Pointer && v.Elem().Kind() == reflect.Struct:
			zero(v.Elem(), path)
		case v.Kind() == reflect.Slice && v.Len() == 0:
			t.Errorf("%s is empty", path)
		case v.Kind() == reflect.Slice:
			zero(v.Index(0), path)
		}
	}
	e := docs[0].Items[0].Entry
	zero(reflect.ValueOf(e), "Entry")
	zero(reflect.ValueOf(docs[0].Proxies), "Proxies")
	if *e.ConsulPassingOnly || !*e.EnableMCPServer || e.TLS.CAFile != "/ca" || e.NacosRefreshInterval.Or(0) != e.ConsulRefreshInterval.Or(1) ||
		e.VPort.Services[0].Value != 8080 || e.Metadata["a"]["innerMap"]["b"] != "c" || e.NacosSecretKey.Reveal() != "sk" {
		t.Errorf("wrong values: %+v", e)
	}
}

func TestParseReads(t *testing.T) {
	for name, c := range map[string]struct {
		file string
		want []string // namespace/name/type/name:port
	}{
		"aliases and merge keys":     {"aliases.yaml", []string{"default/default/consul/a:8500", "default/default/consul/b:8500", "default/default/consul/c:1"}},
		"a list of kubectl":          {"kubectl.yaml", []string{"higress-system/default/consul/my-consul:8500"}},
		"good ones beside bad ones":  {"types.yaml", []string{"!default/default/consul/bad:0", "default/default/consul/good:80", "!default/default/consul/far:0"}},
		"documents beside broken":    {"syntax.yaml", []string{"default/one/consul/a:0", "!default/three/consul/c:0"}},
		"unknown fields do no harm":  {"typos.yaml", nil}, // but nameSpace is a near miss of what decides what the document is
		"json, with escaped emoji":   {"list.json", []string{"!default/a/consul/a:0", "default/b/consul/a:0"}},
		"invalid documents left out": {"kinds.yaml", nil},
	} {
		t.Run(name, func(t *testing.T) {
			data, err := os.ReadFile("testdata/validate/" + c.file)
			if err != nil {
				t.Fatal(err)
			}
			docs, problems := Parse(c.file, data, false)
			var got []string
			for _, d := range docs {
				for _, it := range d.Items {
					s := fmt.Sprintf("%s:%d", key(d, it), it.Entry.Port)
					if it.Err != nil {
						s = "!" + s
						if !strings.Contains(it.Err.Error(), it.Path+".") {
							t.Errorf("%v does not name the field's path", it.Err)
						}
					}
					got = append(got, s)
				}
			}
			if diff := cmp.Diff(c.want, got); diff != "" {
				t.Errorf("(-want +got)\n%s%s", diff, text(problems))
			}
			if c.file == "list.json" && docs[0].Annotations["note"] != `😀 \ud83d\ude00 /` {
				t.Errorf("annotation is %q", docs[0].Annotations["note"])
			}
		})
	}
}

func TestServeOnlyWarnsOfUnknownFields(t *testing.T) {
	const doc = `
apiVersion: networking.higress.io/v1
kind: McpBridge
metadata: {name: default}
spec:
  registries:
  - {type: consul, name: a, Domain: x, extra: 1}
`
	docs, problems := Parse("f.yaml", []byte(doc), false)
	if len(docs) != 1 || docs[0].Items[0].Err != nil || len(problems) != 2 || !problems[0].Warning || !problems[1].Warning {
		t.Errorf("%v %s", docs, text(problems))
	}
	if docs, problems = Parse("f.yaml", []byte(doc), true); len(docs) != 1 || len(problems) != 2 || problems[0].Warning {
		t.Errorf("strict: %v %s", docs, text(problems))
	}
}

func TestRefusesHugeFiles(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f.yaml")
	if err := os.WriteFile(path, make([]byte, maxFileSize+1), 0o600); err != nil {
		t.Fatal(err)
	}
	got := text(Validate([]string{path, "testdata/missing.yaml"}, ValidateOptions{}))
	if !strings.Contains(got, "has more than") || !strings.Contains(got, "missing.yaml: cannot be read") {
		t.Error(got)
	}
}

func FuzzParse(f *testing.F) {
	files, err := configFiles("testdata/validate")
	if err != nil {
		f.Fatal(err)
	}
	for _, path := range files {
		data, err := os.ReadFile(path)
		if err != nil {
			f.Fatal(err)
		}
		if len(data) < 10_000 { // a long one takes the fuzzer minutes to make shorter
			f.Add(data)
		}
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, name := range []string{"f.yaml", "f.json"} {
			docs, problems := Parse(name, data, false)
			for _, d := range docs {
				for _, it := range d.Items {
					if it.Entry.Type == "" || it.Entry.Name == "" || d.Name == "" {
						t.Errorf("a nameless entry: %+v", it)
					}
				}
			}
			if len(problems) > maxProblems {
				t.Errorf("%d problems", len(problems))
			}
			build(docs, nil)
		}
		parseRules("f.yaml", data)
		d := t.TempDir()
		if err := os.WriteFile(filepath.Join(d, "s.yaml"), data, 0o600); err != nil {
			t.Fatal(err)
		}
		found := found{secrets: map[secretName]*secret{}}
		readObjects(&found, filepath.Join(d, "s.yaml"))
	})
}
