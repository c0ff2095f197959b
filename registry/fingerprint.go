package registry

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"reflect"
	"slices"
	"strings"
)

// A Fingerprint tells what an edit of an entry means. Two fingerprints of entries with the same type and name are
// compared part by part.
type Fingerprint struct {
	// Source tells what is read: type, servers, tenant, group, data centre, paths, filters. Where it differs the old
	// services say nothing about the new ones.
	Source string
	// Identity tells as whom we connect, and whom we ask. Where it differs we may be shown other services: that is a gap.
	Identity string
	// Run tells how we read. Where it, or one of the above, differs a new Run is needed; otherwise an edit only changes
	// what is made of the facts.
	Run string
}

// Fingerprint returns the entry's fingerprint. It holds no secret in readable form.
func (e Entry) Fingerprint() Fingerprint {
	parts := map[string]*strings.Builder{"source": {}, "identity": {}, "run": {}, "assemble": {}}
	v := reflect.ValueOf(e)
	for i := range v.NumField() {
		field := v.Type().Field(i)
		part := parts[field.Tag.Get("edit")]
		if part == nil {
			panic("registry: Entry." + field.Name + " has no edit tag")
		}
		if v.Field(i).IsZero() {
			continue
		}
		if field.Name == "Domain" { // in another order, or with other blanks, it is the same source
			fmt.Fprintf(parts["run"], "%s=%s\n", field.Name, e.Domain)
			fmt.Fprintf(part, "%s=%s\n", field.Name, sameDomain(e.Domain))
			continue
		}
		b, err := json.Marshal(v.Field(i).Interface())
		if err != nil {
			panic(fmt.Sprintf("registry: Entry.%s: %v", field.Name, err)) // all field types can be marshalled
		}
		fmt.Fprintf(part, "%s=%s\n", field.Name, b)
	}
	return Fingerprint{
		Source:   digest(parts["source"].String()),
		Identity: digest(parts["identity"].String()),
		Run:      digest(parts["run"].String()),
	}
}

// sameDomain gives equal texts for lists of the same items. What a slash begins belongs to all of them (a chroot), and stays
// at the end.
func sameDomain(domain string) string {
	list, rest, _ := strings.Cut(domain, "/")
	items := strings.Split(list, ",")
	for i, item := range items {
		items[i] = strings.TrimSpace(item)
	}
	slices.Sort(items)
	return strings.TrimLeft(strings.Join(slices.Compact(items), ","), ",") + "/" + strings.TrimSpace(rest)
}

func digest(s string) string {
	sum := sha256.Sum256([]byte(s))
	return hex.EncodeToString(sum[:16])
}
