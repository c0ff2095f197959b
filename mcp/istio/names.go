package istio

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"unicode/utf8"
)

// The limits of stock istiod's validation, and of Envoy's.
const (
	maxPort       = 65535
	maxLabel      = 63  // of a part of a host name, a port's name, a label's name
	maxHost       = 255 // istiod's; DNS itself allows 253
	maxLookup     = 253
	maxKeyPrefix  = 253
	maxServerName = 255 // Envoy refuses all clusters for a longer one
)

// Host returns the name under which the mesh sees the service that its registry names host. It depends on that name
// alone. The name stays as it is where the reader accepts it. Otherwise bad characters become hyphens, and the last part
// that had to change ends in "-rb-" and a hash of the original: "svc_a.default-group.public.nacos" is
// "svc-a-rb-f9fbe5f416beed96.default-group.public.nacos". A name that looks so from the start gets a hash as well. So two
// names never meet, except where they differ in the case of ASCII letters alone, which makes no difference to a mesh.
//
// For stock istiod upper case becomes lower case: it names a service's cluster by the host as it is, but its routes by the
// host in lower case, so that a sidecar answers every HTTP request to an upper-case host with 503 (seen with 1.31). It
// accepts what passes its validation, with one exception: an asterisk is rewritten, since a registrant must not catch the
// traffic of others. Higress accepts all but slashes, which resource names cannot have, and broken UTF-8.
func (d Dialect) Host(host string) string {
	if !d.higress {
		host = lowerASCII(host)
	}
	if d.keeps(host) {
		return host
	}
	parts := strings.Split(host, ".")
	if n := len(parts); !d.higress && n > 1 && parts[n-1] == "" {
		parts = parts[:n-1]
	}
	marked := 0
	for i, p := range parts {
		if !d.keepsPart(p) || !d.higress && i == len(parts)-1 && isNumeric(p) {
			marked = i
		}
	}
	if d.higress {
		for i, p := range parts {
			parts[i] = strings.ReplaceAll(strings.ToValidUTF8(p, "-"), "/", "-")
		}
		parts[marked] += mark(host)
		return strings.Join(parts, ".")
	}
	kept := parts[:0] // without the parts of which nothing is left
	for i, p := range parts {
		if i == marked {
			p = strings.TrimPrefix(hyphenate(p, isDNSChar, maxLabel-markLen)+mark(host), "-")
			marked = len(kept)
		} else if !isDNSLabel(p) {
			p = hyphenate(p, isDNSChar, maxLabel)
		}
		if p != "" {
			kept = append(kept, p)
		}
	}
	return fit(kept, marked)
}

// keeps reports whether the dialect leaves host as it is.
func (d Dialect) keeps(host string) bool {
	if !d.higress {
		if fqdnError(host) != nil {
			return false
		}
		host = strings.TrimSuffix(host, ".")
	}
	for p := range strings.SplitSeq(host, ".") {
		if !d.keepsPart(p) {
			return false
		}
	}
	return true
}

func (d Dialect) keepsPart(p string) bool {
	if isMarked(p) {
		return false
	}
	if d.higress {
		return utf8.ValidString(p) && !strings.Contains(p, "/")
	}
	return isDNSLabel(p)
}

// fit joins the parts of a host name, leaving out parts from its middle until the name can be looked up.
func fit(parts []string, marked int) string {
	host := strings.Join(parts, ".")
	for len(host) > maxLookup {
		i := 1 // 4 or more parts: 3 always fit
		if marked == 1 {
			i = 2
		}
		parts = append(parts[:i], parts[i+1:]...)
		if i < marked {
			marked--
		}
		host = strings.Join(parts, ".")
	}
	return host
}

// A mark is "-rb-" and 16 hexadecimal digits.
const (
	markPrefix = "-rb-"
	markLen    = len(markPrefix) + 16
)

// mark returns the mark of a name that had to be changed.
func mark(original string) string {
	sum := sha256.Sum256([]byte(lowerASCII(original)))
	return markPrefix + hex.EncodeToString(sum[:8])
}

// lowerASCII leaves other alphabets alone, and bytes that are no text.
func lowerASCII(s string) string {
	b := []byte(s)
	for i, c := range b {
		if 'A' <= c && c <= 'Z' {
			b[i] = c + 'a' - 'A'
		}
	}
	return string(b)
}

// isMarked reports whether a part of a host name ends like one that was marked, in any case of letters.
func isMarked(p string) bool {
	if len(p) == markLen-1 {
		p = "-" + p
	}
	if len(p) < markLen {
		return false
	}
	p = p[len(p)-markLen:]
	if !strings.EqualFold(p[:len(markPrefix)], markPrefix) {
		return false
	}
	_, err := hex.DecodeString(p[len(markPrefix):])
	return err == nil
}

// hyphenate returns s, cut to at most limit bytes, with a hyphen for each run of characters that are not allowed, and
// with letters or digits at both ends. It may be empty.
func hyphenate(s string, allowed func(byte) bool, limit int) string {
	b := make([]byte, 0, min(len(s), limit))
	for i := 0; i < len(s) && len(b) < limit; i++ {
		switch c := s[i]; {
		case isAlnum(c), len(b) > 0 && c != '-' && allowed(c):
			b = append(b, c)
		case len(b) > 0 && b[len(b)-1] != '-':
			b = append(b, '-')
		}
	}
	for len(b) > 0 && !isAlnum(b[len(b)-1]) {
		b = b[:len(b)-1]
	}
	return string(b)
}

// labelValue returns s as a value that a Kubernetes label may have: s itself if it may, else a marked name like those of
// Host.
func labelValue(s string) string {
	if len(s) <= maxLabel && isLabelValue(s) {
		return s
	}
	return strings.TrimPrefix(hyphenate(s, isLabelChar, maxLabel-markLen)+mark(s), "-")
}

// fqdnError tells why istiod refuses s as a full host name, nil if it does not.
func fqdnError(s string) error {
	switch {
	case s == "":
		return errors.New("it is empty")
	case len(s) > maxHost:
		return fmt.Errorf("it is longer than %d bytes", maxHost)
	}
	return partsError(s)
}

// hostError tells why istiod refuses s as a host of a ServiceEntry, nil if it does not: unlike a full host name it may
// begin with a wildcard, and a name of one part may be a number.
func hostError(s string) error {
	switch {
	case s == "":
		return errors.New("it is empty")
	case len(s) > maxHost:
		return fmt.Errorf("it is longer than %d bytes", maxHost)
	}
	first, rest, more := strings.Cut(s, ".")
	plain := strings.TrimPrefix(first, "*")
	if plain != first {
		plain = strings.TrimPrefix(plain, "-")
	}
	if len(first) > maxLabel || first != "*" && !isDNSLabel(plain) {
		return partError(first)
	}
	if more {
		return partsError(rest)
	}
	return nil
}

func partsError(s string) error {
	if last := s[strings.LastIndexByte(s, '.')+1:]; isNumeric(last) {
		return fmt.Errorf("its last part %q is a number", last)
	}
	for {
		p, rest, more := strings.Cut(s, ".")
		switch {
		case p == "" && !more: // a final dot
			return nil
		case !isDNSLabel(p):
			return partError(p)
		case !more:
			return nil
		}
		s = rest
	}
}

func partError(p string) error {
	if len(p) > maxLabel {
		return fmt.Errorf("its part %q is longer than %d bytes", p, maxLabel)
	}
	return fmt.Errorf("its part %q is not made of letters, digits and inner hyphens", p)
}

// isNumeric reports what istiod takes for a number: numbers of more than 19 digits are none.
func isNumeric(s string) bool {
	if s == "" || s[len(s)-1] > '9' { // most names: Atoi would allocate an error
		return false
	}
	_, err := strconv.Atoi(s)
	return err == nil
}

// isDNSLabel reports whether s is made of letters, digits and inner hyphens and is 1 to 63 bytes long.
func isDNSLabel(s string) bool { return len(s) <= maxLabel && isName(s, isDNSChar) }

// labelKeyError tells why istiod refuses k as the key of a label, nil if it does not.
func labelKeyError(k string) error {
	name := k
	if prefix, rest, ok := strings.Cut(k, "/"); ok {
		if len(prefix) > maxKeyPrefix {
			return fmt.Errorf("its prefix is longer than %d bytes", maxKeyPrefix)
		}
		for p := range strings.SplitSeq(prefix, ".") {
			if !isName(p, isDNSChar) {
				return errors.New("what stands before its slash is no DNS name")
			}
		}
		name = rest
	}
	switch {
	case len(name) > maxLabel:
		return fmt.Errorf("its name is longer than %d bytes", maxLabel)
	case !isName(name, isLabelChar):
		return errors.New("it is not made of letters, digits and inner hyphens, underscores and dots")
	}
	return nil
}

// isLabelValue reports whether istiod accepts s as the value of a label.
func isLabelValue(s string) bool { return s == "" || isName(s, isLabelChar) }

// isName reports whether s has characters that inner allows, at least one, with letters or digits at both ends.
func isName(s string, inner func(byte) bool) bool {
	if s == "" || !isAlnum(s[0]) || !isAlnum(s[len(s)-1]) {
		return false
	}
	for i := range len(s) {
		if !inner(s[i]) {
			return false
		}
	}
	return true
}

func isAlnum(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9'
}

func isDNSChar(c byte) bool { return isAlnum(c) || c == '-' }

func isLabelChar(c byte) bool { return isAlnum(c) || c == '-' || c == '_' || c == '.' }

// isIP reports whether s is an IP address that Envoy can connect to. One with a zone is not.
func isIP(s string) bool {
	a, err := netip.ParseAddr(s)
	return err == nil && a.Zone() == ""
}

func isZoned(s string) bool {
	a, err := netip.ParseAddr(s)
	return err == nil && a.Zone() != ""
}

// isText reports whether s has something to read and nothing else: no blanks, no control characters, no broken UTF-8.
func isText(s string) bool {
	return s != "" && utf8.ValidString(s) && !strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r == 0x7f })
}
