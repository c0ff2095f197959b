package harness

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
)

// A NacosInstance is one instance of a service. Namespace, Group and Cluster may be empty for public, DEFAULT_GROUP and
// DEFAULT.
type NacosInstance struct {
	// Namespace is the namespace's id. A NacosProvider knows only its own, and takes no other.
	Namespace      string
	Group, Service string
	IP             string
	Port           int
	Cluster        string
	// Weight is 1 if nil.
	Weight   *float64
	Metadata map[string]string
	// Disabled takes the instance out of service.
	Disabled bool
	// Unhealthy is what a provider says of itself; of an instance that dies the server finds it out.
	Unhealthy bool
	// Persistent instances stay until they are deregistered, and the server itself looks after their health: it connects to
	// their address. Providers cannot have any.
	Persistent bool
	// Mortal makes the server expect signs of life of an instance that Register made (see Beat). Otherwise it is told to
	// wait for a day, which shows in the metadata.
	Mortal bool
}

func (i NacosInstance) weight() float64 {
	if i.Weight == nil {
		return 1
	}
	return *i.Weight
}

// key are the parameters that say which instance is meant.
func (i NacosInstance) key() url.Values {
	q := nacosService(i.Namespace, i.Group, i.Service)
	q.Set("ip", i.IP)
	q.Set("port", strconv.Itoa(i.Port))
	q.Set("clusterName", cmp.Or(i.Cluster, "DEFAULT"))
	q.Set("ephemeral", strconv.FormatBool(!i.Persistent))
	return q
}

// parameters are all of the instance.
func (i NacosInstance) parameters() url.Values {
	metadata := map[string]string{}
	if !i.Mortal && !i.Persistent {
		const day = "86400000" // milliseconds
		metadata["preserved.heart.beat.timeout"], metadata["preserved.ip.delete.timeout"] = day, day
	}
	maps.Copy(metadata, i.Metadata)
	text, _ := json.Marshal(metadata) // strings can always be encoded
	q := i.key()
	q.Set("metadata", string(text))
	q.Set("weight", strconv.FormatFloat(i.weight(), 'g', -1, 64))
	q.Set("enabled", strconv.FormatBool(!i.Disabled))
	q.Set("healthy", strconv.FormatBool(!i.Unhealthy))
	return q
}

func nacosService(namespace, group, service string) url.Values {
	return url.Values{
		"namespaceId": {cmp.Or(namespace, "public")}, "groupName": {cmp.Or(group, "DEFAULT_GROUP")}, "serviceName": {service},
	}
}

// path is the first one, or with Nacos 3 the second.
func (n *Nacos) path(v1, v3 string) string {
	if n.Version == 3 {
		return v3
	}
	return v1
}

// Call does one request to the HTTP API, as if it came from another server of the cluster: it needs no login. path begins
// after /nacos. The answer must be 200.
func (n *Nacos) Call(method, path string, parameters url.Values) string {
	n.tb.Helper()
	body, err := n.call(n.tb.Context(), method, path, parameters)
	n.must(err)
	return body
}

func (n *Nacos) must(err error) {
	n.tb.Helper()
	if err != nil {
		n.tb.Fatal(err)
	}
}

func (n *Nacos) call(ctx context.Context, method, path string, parameters url.Values) (string, error) {
	status, body, err := n.request(ctx, method, path, parameters, http.Header{nacosIdentity: {nacosIdentity}})
	if err == nil && status != http.StatusOK {
		err = fmt.Errorf("nacos: %s %s: %d %.300s", method, path, status, body)
	}
	return body, err
}

func (n *Nacos) request(ctx context.Context, method, path string, parameters url.Values, header http.Header) (int, string, error) {
	target, body := "http://"+n.Address+"/nacos"+path, io.Reader(nil)
	if method == http.MethodPost { // long metadata does not fit into a URL
		body = strings.NewReader(parameters.Encode())
		header = header.Clone()
		header.Set("Content-Type", "application/x-www-form-urlencoded")
	} else {
		target += "?" + parameters.Encode()
	}
	req, err := http.NewRequestWithContext(ctx, method, target, body)
	if err != nil {
		return 0, "", err
	}
	req.Header = header
	resp, err := n.client.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close() // only read
	text, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(text), err
}

// Register adds instances, or replaces what is known of them. Nothing keeps them alive: for that, and for what happens after
// a restart, there is StartProvider.
func (n *Nacos) Register(instances ...NacosInstance) {
	n.tb.Helper()
	n.must(n.each(instances, n.register))
}

// Deregister removes instances.
func (n *Nacos) Deregister(instances ...NacosInstance) {
	n.tb.Helper()
	n.must(n.each(instances, n.deregister))
}

// each does do for all, some at the same time.
func (n *Nacos) each(instances []NacosInstance, do func(context.Context, NacosInstance) error) error {
	const workers = 8
	var errs [workers]error
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			for i := w; i < len(instances) && errs[w] == nil; i += workers {
				errs[w] = do(n.tb.Context(), instances[i])
			}
		})
	}
	wg.Wait()
	return errors.Join(errs[:]...)
}

func (n *Nacos) register(ctx context.Context, i NacosInstance) error {
	_, err := n.call(ctx, http.MethodPost, n.path("/v1/ns/instance", "/v3/client/ns/instance"), i.parameters())
	return err
}

func (n *Nacos) deregister(ctx context.Context, i NacosInstance) error {
	_, err := n.call(ctx, http.MethodDelete, n.path("/v1/ns/instance", "/v3/client/ns/instance"), i.key())
	return err
}

// Update changes metadata, weight and Disabled of an instance, as the console does. From Nacos 2 on it stays in force when
// the provider registers the instance again.
func (n *Nacos) Update(i NacosInstance) {
	n.tb.Helper()
	n.Call(http.MethodPut, n.path("/v1/ns/instance", "/v3/admin/ns/instance"), i.parameters())
}

// Beat gives one sign of life of a Mortal instance; the server calls it unhealthy 15 s later, and forgets it after 30 s.
func (n *Nacos) Beat(i NacosInstance) {
	n.tb.Helper()
	q := i.key()
	q.Set("serviceName", cmp.Or(i.Group, "DEFAULT_GROUP")+"@@"+i.Service)
	var answer struct{ Code int }
	body := n.Call(http.MethodPut, "/v1/ns/instance/beat", q)
	if err := json.Unmarshal([]byte(body), &answer); err != nil || answer.Code != 10200 {
		n.tb.Fatalf("nacos: beat of %s at %s:%d: %s", i.Service, i.IP, i.Port, body)
	}
}

// Instances is what the server tells a client that asks by HTTP: all instances but the disabled ones, in no order.
func (n *Nacos) Instances(namespace, group, service string) ([]NacosInstance, error) {
	return n.instances(n.tb.Context(), namespace, group, service)
}

func (n *Nacos) instances(ctx context.Context, namespace, group, service string) ([]NacosInstance, error) {
	body, err := n.call(ctx, http.MethodGet, "/v1/ns/instance/list", nacosService(namespace, group, service))
	if err != nil {
		return nil, err
	}
	var answer struct {
		Hosts []struct {
			IP                 string
			Port               int
			Weight             float64
			ClusterName        string
			Healthy, Ephemeral bool
			Metadata           map[string]string
		}
	}
	if err := json.Unmarshal([]byte(body), &answer); err != nil {
		return nil, fmt.Errorf("nacos: list the instances of %s: %w in %s", service, err, body)
	}
	var all []NacosInstance
	for _, h := range answer.Hosts {
		all = append(all, NacosInstance{
			Namespace: namespace, Group: group, Service: service, IP: h.IP, Port: h.Port, Cluster: h.ClusterName, Weight: &h.Weight,
			Metadata: h.Metadata, Unhealthy: !h.Healthy, Persistent: !h.Ephemeral,
		})
	}
	return all, nil
}

// Services are the names of a group's services, those without instances among them, in no order.
func (n *Nacos) Services(namespace, group string) ([]string, error) {
	return n.services(n.tb.Context(), namespace, group)
}

func (n *Nacos) services(ctx context.Context, namespace, group string) ([]string, error) {
	q := nacosService(namespace, group, "")
	q.Set("pageNo", "1")
	q.Set("pageSize", "1000000")
	body, err := n.call(ctx, http.MethodGet, "/v1/ns/service/list", q)
	if err != nil {
		return nil, err
	}
	var answer struct{ Doms []string }
	if err := json.Unmarshal([]byte(body), &answer); err != nil {
		return nil, fmt.Errorf("nacos: list services: %w in %s", err, body)
	}
	return answer.Doms, nil
}

// DeleteService deletes a service. From Nacos 2 on it must not have instances.
func (n *Nacos) DeleteService(namespace, group, service string) {
	n.tb.Helper()
	n.must(n.deleteService(n.tb.Context(), namespace, group, service))
}

func (n *Nacos) deleteService(ctx context.Context, namespace, group, service string) error {
	_, err := n.call(ctx, http.MethodDelete, n.path("/v1/ns/service", "/v3/admin/ns/service"), nacosService(namespace, group, service))
	return err
}

// Subscribers is the number of clients that the server would tell of a change of the service. Of Nacos 1 that is nobody but
// those with a UDP port.
func (n *Nacos) Subscribers(namespace, group, service string) (int, error) {
	q := nacosService(namespace, group, service)
	q.Set("pageNo", "1")
	q.Set("pageSize", "1")
	q.Set("aggregation", "false")
	body, err := n.call(n.tb.Context(), http.MethodGet, n.path("/v1/ns/service/subscribers", "/v3/admin/ns/service/subscribers"), q)
	if err != nil {
		return 0, err
	}
	var answer struct {
		Count *int
		Data  struct{ TotalCount *int }
	}
	err = json.Unmarshal([]byte(body), &answer)
	switch count := cmp.Or(answer.Count, answer.Data.TotalCount); {
	case err != nil:
		return 0, fmt.Errorf("nacos: subscribers of %s: %w in %s", service, err, body)
	case count == nil:
		return 0, fmt.Errorf("nacos: subscribers of %s: no number in %s", service, body)
	default:
		return *count, nil
	}
}

// CreateNamespace adds a namespace with that id, which is also its name.
func (n *Nacos) CreateNamespace(id string) {
	n.tb.Helper()
	n.Call(http.MethodPost, n.path("/v1/console/namespaces", "/v3/admin/core/namespace"), url.Values{
		"customNamespaceId": {id}, "namespaceId": {id}, "namespaceName": {id}, "namespaceDesc": {id},
	})
}

// Token logs a user in. A refused login is an error.
func (n *Nacos) Token(user, password string) (string, error) {
	q := url.Values{"username": {user}, "password": {password}}
	status, body, err := n.request(n.tb.Context(), http.MethodPost, "/v1/auth/users/login", q, http.Header{})
	if err != nil {
		return "", err
	}
	var answer struct{ AccessToken string }
	if err := json.Unmarshal([]byte(body), &answer); err != nil || answer.AccessToken == "" {
		return "", fmt.Errorf("nacos: log in as %s: %d %.200s", user, status, body)
	}
	return answer.AccessToken, nil
}

// SetPassword changes a user's password. Who has a token keeps it until it expires.
func (n *Nacos) SetPassword(user, password string) {
	n.tb.Helper()
	if n.Version == 3 && user != n.User { // it lets nobody change the password of somebody else; what a user may stays
		n.Call(http.MethodDelete, "/v3/auth/user", url.Values{"username": {user}})
		n.Call(http.MethodPost, "/v3/auth/user", url.Values{"username": {user}, "password": {password}})
		return
	}
	token, err := n.Token(n.User, n.Password)
	n.must(err)
	q := url.Values{"username": {user}, "newPassword": {password}, "accessToken": {token}}
	status, body, err := n.request(n.tb.Context(), http.MethodPut, n.path("/v1/auth/users", "/v3/auth/user"), q, http.Header{})
	if err != nil || status != http.StatusOK {
		n.tb.Fatalf("nacos: set the password of %s: %d %s %v", user, status, body, err)
	}
	if user == n.User {
		n.Password = password
	}
}

// CreateUser adds a user who may read the services of these namespaces ("" is public) and do nothing else. The server takes
// up to 15 s to believe it, for which CreateUser waits.
func (n *Nacos) CreateUser(user, password string, namespaces ...string) {
	n.tb.Helper()
	users, roles, permissions := "/v1/auth/users", "/v1/auth/roles", "/v1/auth/permissions"
	if n.Version == 3 {
		users, roles, permissions = "/v3/auth/user", "/v3/auth/role", "/v3/auth/permission"
	}
	n.Call(http.MethodPost, users, url.Values{"username": {user}, "password": {password}})
	role := "readers-" + user
	n.Call(http.MethodPost, roles, url.Values{"role": {role}, "username": {user}})
	for _, namespace := range namespaces {
		n.Call(http.MethodPost, permissions, url.Values{"role": {role}, "action": {"r"}, "resource": {namespace + ":*:naming/*"}})
	}
	Eventually(n.tb, readyTimeout, func() error { return n.mayRead(user, password, namespaces...) })
}

// mayRead returns nil if the user may list the services of all these namespaces.
func (n *Nacos) mayRead(user, password string, namespaces ...string) error {
	token, err := n.Token(user, password)
	if err != nil {
		return err
	}
	for _, namespace := range namespaces {
		q := url.Values{"namespaceId": {namespace}, "pageNo": {"1"}, "pageSize": {"1"}, "accessToken": {token}}
		status, body, err := n.request(n.tb.Context(), http.MethodGet, "/v1/ns/service/list", q, http.Header{})
		if err == nil && status != http.StatusOK {
			err = fmt.Errorf("%s lists the services of %q: %d %.300s", user, namespace, status, body)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// Requests is how many requests the server has taken by HTTP and by gRPC since its start; of those by gRPC it knows some
// seconds later. Signs of life by HTTP and readings of this number do not count.
func (n *Nacos) Requests() (http, grpc float64, err error) {
	page, err := getOK(n.tb.Context(), "http://"+n.Address+"/nacos/actuator/prometheus")
	if err != nil {
		return 0, 0, err
	}
	count := func(name string, labels ...string) float64 { // all of one page, since each reading counts as well
		sum, failed := sumOf(page, name, labels)
		err = errors.Join(err, failed)
		return sum
	}
	const served = "http_server_requests_seconds_count"
	http = count(served) - count(served, `uri="/actuator/prometheus"`) - count(served, `uri="/v1/ns/instance/beat"`)
	grpc = count("grpc_server_executor", `name="taskCount"`, `type="grpcSdkServer"`)
	return http, grpc, err
}
