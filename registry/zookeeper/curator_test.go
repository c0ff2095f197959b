package zookeeper

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func showNode(n node) string {
	var out []string
	for _, i := range n.instances {
		out = append(out, show(i))
	}
	return strings.Join(out, "; ")
}

func TestDecodeNode(t *testing.T) {
	metadata := func(s string) string { return `{"address":"10.0.0.1","port":80,"payload":{"metadata":{` + s + `}}}` }
	for name, c := range map[string]struct{ data, want string }{
		"bare":                {`{"address":"10.0.0.1","port":80}`, "10.0.0.1:80 weight 1"},
		"nulls":               {`{"address":"10.0.0.1","port":80,"sslPort":null,"payload":null,"enabled":null,"name":null}`, "10.0.0.1:80 weight 1"},
		"text for numbers":    {`{"address":"10.0.0.1","port":"80","sslPort":"0","enabled":"true"}`, "10.0.0.1:80 weight 1"},
		"both ports":          {`{"address":"10.0.0.1","port":80,"sslPort":8443}`, "10.0.0.1:80 weight 1"},
		"sslPort only":        {`{"address":"10.0.0.1","port":null,"sslPort":8443}`, "https 10.0.0.1:8443 weight 1"},
		"sslPort and port 0":  {`{"address":"10.0.0.1","port":0,"sslPort":8443}`, "https 10.0.0.1:8443 weight 1"},
		"host name":           {`{"address":"pod-0.order","port":80}`, "pod-0.order:80 weight 1"},
		"IPv6":                {`{"address":"[2001:db8::1]","port":80}`, "2001:db8::1:80 weight 1"},
		"not enabled":         {`{"address":"10.0.0.1","port":80,"enabled":false}`, "10.0.0.1:80 weight 1 disabled: is not enabled (enabled=false)"},
		"payload is a text":   {`{"address":"10.0.0.1","port":80,"payload":"x"}`, "10.0.0.1:80 weight 1"},
		"payload is a list":   {`{"address":"10.0.0.1","port":80,"payload":["java.lang.String","x"]}`, "10.0.0.1:80 weight 1"},
		"metadata is a text":  {`{"address":"10.0.0.1","port":80,"payload":{"metadata":"x"}}`, "10.0.0.1:80 weight 1"},
		"up":                  {metadata(`"instance_status":"up"`), "10.0.0.1:80 weight 1"},
		"out of service":      {metadata(`"instance_status":"out_of_service"`), "10.0.0.1:80 weight 1 disabled: instance_status is out_of_service"},
		"down":                {metadata(`"instance_status":"DOWN"`), "10.0.0.1:80 weight 1 unhealthy: instance_status is DOWN"},
		"starting":            {metadata(`"instance_status":"STARTING"`), "10.0.0.1:80 weight 1 unhealthy: instance_status is STARTING"},
		"weight":              {metadata(`"weight":"2.5"`), "10.0.0.1:80 weight 2.5"},
		"weight as a number":  {metadata(`"weight":3`), "10.0.0.1:80 weight 3"},
		"weight 0 is none":    {metadata(`"weight":"0"`), "10.0.0.1:80 weight 1"},
		"negative weight":     {metadata(`"weight":"-1"`), "10.0.0.1:80 weight 1"},
		"no weight":           {metadata(`"weight":"NaN"`), "10.0.0.1:80 weight 1"},
		"boundless weight":    {metadata(`"weight":"+Inf"`), "10.0.0.1:80 weight 1"},
		"zone":                {metadata(`"zone":"z1"`), "10.0.0.1:80 weight 1 in /z1"},
		"protocol is a label": {metadata(`"protocol":"grpc"`), "10.0.0.1:80 weight 1"},

		"Dubbo by its class":      {`{"address":"10.0.0.1","port":80,"payload":{"@class":"org.apache.dubbo.X"}}`, "dubbo 10.0.0.1:80 weight 1"},
		"Dubbo's own port":        {metadata(`"dubbo.endpoints":"[]"`), "dubbo 10.0.0.1:80 weight 1"},
		"Dubbo's own protocol":    {metadata(`"dubbo.endpoints":"[]","protocol":"TRI"`), "tri 10.0.0.1:80 weight 1"},
		"Dubbo's endpoints":       {metadata(`"dubbo.endpoints":"[{\"port\":1,\"protocol\":\"dubbo\"},{\"port\":\"2\",\"protocol\":\"tri\"}]"`), "dubbo 10.0.0.1:1 weight 1; tri 10.0.0.1:2 weight 1"},
		"endpoints are no text":   {metadata(`"dubbo.endpoints":[{"port":1,"protocol":"tri"}]`), "tri 10.0.0.1:1 weight 1"},
		"endpoint of no protocol": {metadata(`"dubbo.endpoints":"[{\"port\":1}]"`), "dubbo 10.0.0.1:1 weight 1"},
		"Dubbo, not enabled": {
			`{"address":"10.0.0.1","port":80,"enabled":false,"payload":{"@class":"dubbo"}}`,
			"dubbo 10.0.0.1:80 weight 1 disabled: is not enabled (enabled=false)",
		},
		"Dubbo's weight": {metadata(`"dubbo.endpoints":"","weight":"50"`), "dubbo 10.0.0.1:80 weight 0.5"},
	} {
		t.Run(name, func(t *testing.T) {
			n, err := decodeNode([]byte(c.data))
			if err != nil || showNode(n) != c.want || n.dubbo != strings.Contains(strings.ToLower(c.data), "dubbo") {
				t.Errorf("got %q (of Dubbo: %v), error %v; want %q", showNode(n), n.dubbo, err, c.want)
			}
		})
	}
}

func TestNodeLabels(t *testing.T) {
	n, err := decodeNode([]byte(`{"address":"10.0.0.1","port":80,"payload":{"@class":"x.Spring","id":"order","metadata":{
		"@class":"java.util.HashMap","n":1.50,"b":true,"null":null,"t":"a b","list":[1,"x"],"":"nameless"}}}`))
	want := map[string]string{"n": "1.50", "b": "true", "t": "a b", "list": `[1,"x"]`}
	if diff := cmp.Diff(want, n.instances[0].Metadata.Map()); diff != "" || err != nil {
		t.Errorf("error %v, -want +got:\n%s", err, diff)
	}

	n, err = decodeNode([]byte(`{"name":"app-a","address":"10.0.0.1","port":80,"registrationTimeUTC":17,"payload":{"metadata":{"dubbo.endpoints":"[]",
		"dubbo.metadata-service.url-params":"{}","dubbo.metadata.revision":"r1","dubbo.metadata.storage-type":"remote","env":"gray"}}}`))
	want = map[string]string{"dubbo.metadata.revision": "r1", "dubbo.metadata.storage-type": "remote", "env": "gray"}
	if diff := cmp.Diff(want, n.instances[0].Metadata.Map()); diff != "" || err != nil {
		t.Errorf("Dubbo: error %v, -want +got:\n%s", err, diff)
	}
	if n.application != "app-a" || n.revision != "r1" || !n.remoteMetadata || n.registered != 17 {
		t.Errorf("Dubbo: %+v", n)
	}
}

func TestBadNode(t *testing.T) {
	for data, want := range map[string]string{
		"":                                    "not the JSON of Curator",
		"127.0.0.1":                           "not the JSON of Curator",
		"null":                                "no address",
		"[]":                                  "not the JSON of Curator",
		`{"port":80}`:                         "no address",
		`{"address":"","port":80}`:            "no address",
		`{"address":"0.0.0.0","port":80}`:     "that of all interfaces",
		`{"address":"10.0.0.999","port":80}`:  "neither an IP address nor a host name",
		`{"address":{"a":"b"},"port":80}`:     "neither an IP address nor a host name",
		`{"address":"10.0.0.1"}`:              "neither a port nor an sslPort",
		`{"address":"10.0.0.1","port":70000}`: "neither a port nor an sslPort",
		`{"address":"10.0.0.1","port":-1}`:    "neither a port nor an sslPort",
		`{"address":"10.0.0.1","port":80.5}`:  "neither a port nor an sslPort",
		`{"address":"10.0.0.1","port":0,"payload":{"@class":"dubbo","metadata":{"dubbo.endpoints":"[7]"}}}`: "has no port",
	} {
		n, err := decodeNode([]byte(data))
		if err == nil || !strings.Contains(err.Error(), want) || len(n.instances) != 0 {
			t.Errorf("%s became %+v, error %v; want one with %q", data, n, err, want)
		}
	}
}

// TestBadEndpointHarmsOnlyItself: the others are given together with the error.
func TestBadEndpointHarmsOnlyItself(t *testing.T) {
	for endpoints, want := range map[string]string{
		`[{"port":0,"protocol":"dubbo"},{"port":2,"protocol":"tri"},"x"]`: "tri 10.0.0.1:2 weight 1",
		`[{"port":99999}]`: "dubbo 10.0.0.1:80 weight 1",
		`rubbish`:          "dubbo 10.0.0.1:80 weight 1",
	} {
		data := `{"address":"10.0.0.1","port":80,"payload":{"metadata":{"dubbo.endpoints":"` + strings.ReplaceAll(endpoints, `"`, `\"`) + `"}}}`
		n, err := decodeNode([]byte(data))
		if err == nil || !strings.Contains(err.Error(), "dubbo.endpoints of 10.0.0.1") || showNode(n) != want {
			t.Errorf("%s: got %q, error %v; want %q", endpoints, showNode(n), err, want)
		}
	}
}

func TestRootService(t *testing.T) {
	for _, c := range [][4]string{
		{"/services", "order", "/services/order", "order.services.zookeeper"},
		{"/apps/prod", "order", "/apps/prod/order", "order.apps-prod.zookeeper"},
		{"/", "order", "/order", "order.zookeeper"},
		{"", "order", "/order", "order.zookeeper"},
		{"/services/", "pay.service", "/services/pay.service", "pay.service.services.zookeeper"},
	} {
		if s := rootService(c[0], c[1], nil); s.ID != c[2] || s.Host != c[3] || len(s.Instances) != 0 {
			t.Errorf("%v: %+v", c, s)
		}
	}
	// The node of a dead process, whose session has not ended, says another thing than that of its successor.
	var nodes []node
	for _, data := range []string{
		`{"address":"10.0.0.2","port":80,"registrationTimeUTC":9}`,
		`{"address":"10.0.0.10","port":80,"registrationTimeUTC":9}`,
		`{"address":"10.0.0.1","port":80,"registrationTimeUTC":5,"payload":{"metadata":{"instance_status":"UP"}}}`,
		`{"address":"10.0.0.1","port":80,"registrationTimeUTC":7,"payload":{"metadata":{"instance_status":"OUT_OF_SERVICE"}}}`,
	} {
		n, err := decodeNode([]byte(data))
		if err != nil {
			t.Fatal(err)
		}
		nodes = append(nodes, n)
	}
	want := "10.0.0.1:80 weight 1 disabled: instance_status is OUT_OF_SERVICE; 10.0.0.10:80 weight 1; 10.0.0.2:80 weight 1"
	if got := showNode(node{instances: rootService("/services", "order", nodes).Instances}); got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}
