package harness

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/regbridge/regbridge/test/servers"
)

// NacosProviderOptions says as whom a provider registers. The zero value is the public namespace and, where the server asks,
// the first user.
type NacosProviderOptions struct {
	// Namespace is the namespace's id.
	Namespace      string
	User, Password string
	// Beat is the time between two signs of life with Nacos 1; 0 means 5 s, as real applications do it.
	Beat time.Duration
}

// NacosProvider is an application: a process that registers instances and keeps them alive, with Nacos 2 and 3 through
// Nacos's own client for Go, with Nacos 1 by HTTP. It comes back by itself after the server was away. Stop has it take its
// instances back; Kill lets it vanish, which Nacos 1 notices after 15 to 30 s and the others at once; Pause has it hang.
type NacosProvider struct {
	*Process
	address   string
	namespace string
}

// StartProvider starts a provider that provides nothing yet.
func (n *Nacos) StartProvider(o NacosProviderOptions) *NacosProvider {
	n.tb.Helper()
	program := servers.Need(n.tb, servers.NacosProvider)
	p := &NacosProvider{namespace: o.Namespace}
	if o.User == "" {
		o.User, o.Password = n.User, n.Password
	}
	p.Process = start(n.tb, "nacosprovider", func(process *Process) (command, error) {
		ports, err := freePorts(n.tb.Context(), 1)
		if err != nil {
			return command{}, err
		}
		p.address = loopback(ports[0])
		args := []string{
			"-listen=" + p.address, "-server=" + n.Address, "-dir=" + process.dir, "-user=" + o.User,
			"-http=" + strconv.FormatBool(n.Version == 1),
		}
		if o.Namespace != "" {
			args = append(args, "-namespace="+o.Namespace)
		}
		if o.Beat > 0 {
			args = append(args, "-beat="+o.Beat.String())
		}
		return command{program: program, args: args, env: []string{"NACOS_PASSWORD=" + o.Password}, ready: func(ctx context.Context) error {
			_, err := getOK(ctx, "http://"+p.address)
			return err
		}}, nil
	})
	return p
}

// The provider's own words for what it takes.
type (
	providedService struct {
		Group, Name string
		Instances   []providedInstance
	}
	providedInstance struct {
		IP                  string
		Port                int
		Weight              float64
		Cluster             string
		Metadata            map[string]string
		Disabled, Unhealthy bool
	}
)

// Provide registers all instances that the provider has of one service, in place of those that it had; without any it takes
// those back.
func (p *NacosProvider) Provide(group, service string, instances ...NacosInstance) {
	p.tb.Helper()
	s, err := p.service(group, service, instances)
	if err == nil {
		err = p.provide([]providedService{s})
	}
	if err != nil {
		p.tb.Fatal(err)
	}
}

// ProvideAll is Provide for many services at once.
func (p *NacosProvider) ProvideAll(instances ...NacosInstance) {
	p.tb.Helper()
	type key struct{ group, service string }
	byService := map[key][]NacosInstance{}
	for _, i := range instances {
		k := key{i.Group, i.Service}
		byService[k] = append(byService[k], i)
	}
	var all []providedService
	for k, instances := range byService {
		s, err := p.service(k.group, k.service, instances)
		if err != nil {
			p.tb.Fatal(err)
		}
		all = append(all, s)
	}
	if err := p.provide(all); err != nil {
		p.tb.Fatal(err)
	}
}

func (p *NacosProvider) service(group, service string, instances []NacosInstance) (providedService, error) {
	s := providedService{Group: group, Name: service}
	for _, i := range instances {
		if i.Persistent || i.Namespace != p.namespace {
			return s, fmt.Errorf("a provider of namespace %q cannot provide the instance %+v", p.namespace, i)
		}
		s.Instances = append(s.Instances, providedInstance{
			IP: i.IP, Port: i.Port, Weight: i.weight(), Cluster: i.Cluster, Metadata: i.Metadata, Disabled: i.Disabled, Unhealthy: i.Unhealthy,
		})
	}
	return s, nil
}

func (p *NacosProvider) provide(all []providedService) error {
	ctx, cancel := context.WithTimeout(p.tb.Context(), readyTimeout)
	defer cancel()
	status, body, err := call(ctx, http.MethodPost, "http://"+p.address, nil, all)
	if err == nil && status != http.StatusOK {
		err = fmt.Errorf("nacos provider: %d %s", status, body)
	}
	return err
}

// Watch returns the instances that the server last told this provider of, and has it watch the service from the first call
// on. Until the server tells something for the first time they are nil. Nacos 1 tells nothing.
func (p *NacosProvider) Watch(group, service string) ([]NacosInstance, error) {
	q := url.Values{"group": {group}, "service": {service}}
	body, err := getOK(p.tb.Context(), "http://"+p.address+"/watch?"+q.Encode())
	if err != nil {
		return nil, err
	}
	var told []providedInstance
	if err := json.Unmarshal([]byte(body), &told); err != nil || told == nil {
		return nil, err
	}
	all := []NacosInstance{}
	for _, i := range told {
		all = append(all, NacosInstance{
			Namespace: p.namespace, Group: group, Service: service, IP: i.IP, Port: i.Port, Cluster: i.Cluster, Weight: &i.Weight,
			Metadata: i.Metadata, Disabled: i.Disabled, Unhealthy: i.Unhealthy,
		})
	}
	return all, nil
}
