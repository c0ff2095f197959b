package eureka

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"strconv"
	"strings"
)

// answer is what a server says: all that it knows, or in a delta what has changed. The form is that of
// https://github.com/Netflix/eureka/wiki/Eureka-REST-operations, as the servers' JSON has it.
type answer struct {
	version int64
	hash    string // of all that the server knows, also in a delta
	apps    map[string][]record
	size    int // instances
	odd     int // elements that are no instances of an application
}

// instanceInfo is one instance. Servers write numbers and truth as such or as texts, and field names in this or in lower
// case, which package json does not distinguish. A field of another type is left out.
type instanceInfo struct {
	ID         text `json:"instanceId"`
	HostName   text `json:"hostName"`
	App        text `json:"app"`
	IPAddr     text `json:"ipAddr"`
	Status     text `json:"status"`
	Port       port `json:"port"`
	SecurePort port `json:"securePort"`
	DataCenter struct {
		Metadata struct {
			InstanceID text `json:"instance-id"`
			Zone       text `json:"availability-zone"`
		} `json:"metadata"`
	} `json:"dataCenterInfo"`
	Lease struct {
		Registered number `json:"registrationTimestamp"` // milliseconds, by the server's clock
	} `json:"leaseInfo"`
	Metadata map[string]text `json:"metadata"`
	Updated  number          `json:"lastUpdatedTimestamp"` // milliseconds, by the server's clock
	Dirty    number          `json:"lastDirtyTimestamp"`   // milliseconds, by the instance's clock
	Action   text            `json:"actionType"`           // ADDED, MODIFIED or DELETED; says something in a delta only
}

// text is a text, number or truth value; of anything else it is empty.
type text string

// UnmarshalJSON reads all forms.
func (t *text) UnmarshalJSON(b []byte) error {
	switch b[0] {
	case '"':
		if bytes.IndexByte(b, '\\') < 0 && ascii(b) {
			*t = text(b[1 : len(b)-1])
			return nil
		}
		var s string
		err := json.Unmarshal(b, &s)
		*t = text(s)
		return err
	case '{', '[', 'n':
		*t = ""
	default:
		*t = text(b)
	}
	return nil
}

func ascii(b []byte) bool {
	for _, c := range b {
		if c >= 0x80 {
			return false
		}
	}
	return true
}

// number is a whole number, also as a text; of anything else it is 0.
type number int64

// UnmarshalJSON reads both forms.
func (n *number) UnmarshalJSON(b []byte) error {
	s := strings.TrimSpace(strings.Trim(string(b), `"`))
	*n = 0
	if i, err := strconv.ParseInt(s, 10, 64); err == nil {
		*n = number(i)
	} else if f, err := strconv.ParseFloat(s, 64); err == nil && math.Abs(f) < 1<<53 {
		*n = number(f)
	}
	return nil
}

// port is {"$":8080,"@enabled":"true"}. From other writers it may be the number alone.
type port struct {
	Number  number `json:"$"`
	Enabled text   `json:"@enabled"` // empty if it is not told
}

// UnmarshalJSON reads both forms.
func (p *port) UnmarshalJSON(b []byte) error {
	*p = port{}
	if b[0] != '{' {
		return p.Number.UnmarshalJSON(b)
	}
	type plain port
	return ignoreTypes(json.Unmarshal(b, (*plain)(p)))
}

// ignoreTypes drops the error about a field of another type than expected. Package json has then decoded all others.
func ignoreTypes(err error) error {
	if _, ok := errors.AsType[*json.UnmarshalTypeError](err); ok {
		return nil
	}
	return err
}

// errCut is the error of an answer that ends too early.
var errCut = errors.New("the answer ends too early")

// decoder reads an answer as it comes, so that no more than one instance of it is held.
type decoder struct {
	*json.Decoder
	answer answer
	choice choice
	next   func() // is called after each instance and application
	most   int    // instances, and applications without
	empty  int    // applications without instances, so far
}

// decode reads an answer. It fails on whatever is not whole.
func decode(body io.Reader, c choice, next func()) (*answer, error) {
	d := &decoder{
		Decoder: json.NewDecoder(body), answer: answer{apps: map[string][]record{}}, choice: c, next: next, most: maxInstances,
	}
	return d.decode()
}

func (d *decoder) decode() (*answer, error) {
	d.UseNumber() // of fields that do not matter, any
	found := false
	err := d.object(func(key string) error {
		if key != "applications" || found {
			return d.skip()
		}
		found = true
		return d.applications()
	})
	switch {
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return nil, errCut
	case err != nil:
		return nil, err
	case !found:
		return nil, errors.New(`it has no "applications"`)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("something follows its end")
	}
	for name, records := range d.answer.apps {
		d.answer.apps[name] = settled(records)
	}
	return &d.answer, nil
}

func (d *decoder) applications() error {
	listed, counted := false, false
	err := d.object(func(key string) error {
		switch key {
		case "versions__delta":
			var n number
			err := d.Decode(&n)
			d.answer.version = int64(n)
			return err
		case "apps__hashcode":
			var t text
			err := d.Decode(&t)
			d.answer.hash, counted = string(t), true
			return err
		case "application":
			listed = true
			return d.list(d.application)
		default:
			return d.skip()
		}
	})
	if err == nil && !listed && !counted {
		return errors.New(`its "applications" lists and counts nothing`)
	}
	return err
}

// application reads the rest of an application's object.
func (d *decoder) application() error {
	var name text
	var instances []record
	add := func(i *instanceInfo) error {
		if name == "" {
			name = i.App
		}
		if d.answer.size++; d.answer.size > d.most {
			return fmt.Errorf("it has more than %d instances", d.most)
		}
		instances = append(instances, d.choice.record(i))
		d.next()
		return nil
	}
	err := d.fields(func(key string) error {
		switch key {
		case "name":
			return d.Decode(&name)
		case "instance":
			return d.instances(add)
		default:
			return d.skip()
		}
	})
	if err != nil {
		return err
	}
	if len(instances) == 0 {
		if d.empty++; d.empty > d.most {
			return fmt.Errorf("it has more than %d applications without instances", d.most)
		}
	}
	if name == "" {
		d.answer.odd += max(1, len(instances))
		return nil
	}
	d.answer.apps[string(name)] = append(d.answer.apps[string(name)], instances...)
	return nil
}

// instances reads a list of instances, or a single one.
func (d *decoder) instances(add func(*instanceInfo) error) error {
	t, err := d.Token()
	if err != nil {
		return err
	}
	switch t {
	case json.Delim('['):
		for d.More() {
			var i instanceInfo
			err := d.Decode(&i)
			if wrong, ok := errors.AsType[*json.UnmarshalTypeError](err); ok && wrong.Field == "" {
				d.answer.odd++
				d.next()
				continue
			}
			if err := ignoreTypes(err); err != nil {
				return err
			}
			if err := add(&i); err != nil {
				return err
			}
		}
		_, err = d.Token()
		return err
	case json.Delim('{'): // its opening brace is read already
		fields := map[string]json.RawMessage{}
		err := d.fields(func(key string) error {
			var raw json.RawMessage
			err := d.Decode(&raw)
			fields[key] = raw
			return err
		})
		if err != nil {
			return err
		}
		whole, err := json.Marshal(fields)
		if err != nil {
			return err
		}
		var i instanceInfo
		if err := ignoreTypes(json.Unmarshal(whole, &i)); err != nil {
			return err
		}
		return add(&i)
	default:
		return d.none(t)
	}
}

// list calls element for each object of a list, or for a single one, once its opening brace was read.
func (d *decoder) list(element func() error) error {
	t, err := d.Token()
	if err != nil {
		return err
	}
	switch t {
	case json.Delim('{'):
		return element()
	case json.Delim('['):
		for d.More() {
			t, err := d.Token()
			switch {
			case err != nil:
				return err
			case t == json.Delim('{'):
				err = element()
			case t == json.Delim('['):
				err = errors.New("it has a list where an application should be")
			default:
				d.answer.odd++
			}
			if err != nil {
				return err
			}
			d.next()
		}
		_, err = d.Token()
		return err
	default:
		return d.none(t)
	}
}

// none takes what stands for an empty list.
func (d *decoder) none(t json.Token) error {
	if t == nil || t == "" {
		return nil
	}
	return errors.New("it has something else where a list should be")
}

// object calls field for each key of the object that follows. field reads the value.
func (d *decoder) object(field func(key string) error) error {
	t, err := d.Token()
	if err != nil {
		return err
	}
	if t != json.Delim('{') {
		return errors.New("it has something else where an object should be")
	}
	return d.fields(field)
}

// fields is object once the opening brace was read.
func (d *decoder) fields(field func(key string) error) error {
	for d.More() {
		t, err := d.Token()
		if err != nil {
			return err
		}
		key, ok := t.(string)
		if !ok {
			return errors.New("it has a key that is no text")
		}
		if err := field(key); err != nil {
			return err
		}
	}
	_, err := d.Token()
	return err
}

func (d *decoder) skip() error {
	var raw json.RawMessage
	return d.Decode(&raw)
}
