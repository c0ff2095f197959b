package main

import (
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"strconv"
	"sync"

	"github.com/nacos-group/nacos-sdk-go/v2/clients"
	"github.com/nacos-group/nacos-sdk-go/v2/clients/naming_client"
	"github.com/nacos-group/nacos-sdk-go/v2/common/constant"
	"github.com/nacos-group/nacos-sdk-go/v2/model"
	"github.com/nacos-group/nacos-sdk-go/v2/vo"
)

// sdkRegistry is Nacos's own client. It talks gRPC on the port 1000 above the server's.
type sdkRegistry struct {
	client naming_client.INamingClient

	mu   sync.Mutex
	told map[[2]string][]instance // by group and name; nil: watched, and not told yet
}

func newSDKRegistry(o options) (*sdkRegistry, error) {
	host, text, err := net.SplitHostPort(o.server)
	if err != nil {
		return nil, err
	}
	port, err := strconv.ParseUint(text, 10, 16)
	if err != nil {
		return nil, err
	}
	client, err := clients.NewNamingClient(vo.NacosClientParam{
		ClientConfig: &constant.ClientConfig{
			NamespaceId: o.namespace, Username: o.user, Password: o.password,
			TimeoutMs: 5000, NotLoadCacheAtStart: true, UpdateCacheWhenEmpty: true,
			LogLevel: "warn", AppendToStdout: true, LogDir: filepath.Join(o.dir, "log"), CacheDir: filepath.Join(o.dir, "cache"),
		},
		ServerConfigs: []constant.ServerConfig{*constant.NewServerConfig(host, port)},
	})
	if err != nil {
		return nil, err
	}
	return &sdkRegistry{client: client, told: map[[2]string][]instance{}}, nil
}

func (r *sdkRegistry) close() { r.client.CloseClient() }

// reach asks for a list, because the client is made, and says that it is healthy, without a server too.
func (r *sdkRegistry) reach() error {
	_, err := r.client.GetAllServicesInfo(vo.GetAllServiceInfoParam{PageNo: 1, PageSize: 1})
	return err
}

// provide knows two ways, because the server takes a single registration of a second instance for a change of the first.
func (r *sdkRegistry) provide(s service, _ []instance) error {
	batch := make([]vo.RegisterInstanceParam, len(s.Instances))
	for n, i := range s.Instances {
		batch[n] = vo.RegisterInstanceParam{
			GroupName: s.Group, ServiceName: s.Name, Ip: i.IP, Port: i.Port, Weight: i.Weight, ClusterName: i.Cluster, Metadata: i.Metadata,
			Enable: !i.Disabled, Healthy: !i.Unhealthy, Ephemeral: true,
		}
	}
	if len(batch) == 1 {
		return refused(r.client.RegisterInstance(batch[0]))
	}
	return refused(r.client.BatchRegisterInstance(vo.BatchRegisterInstanceParam{GroupName: s.Group, ServiceName: s.Name, Instances: batch}))
}

// withdraw names one instance; the server forgets all that this client has of the service.
func (r *sdkRegistry) withdraw(s service) error {
	i := s.Instances[0]
	return refused(r.client.DeregisterInstance(vo.DeregisterInstanceParam{
		GroupName: s.Group, ServiceName: s.Name, Ip: i.IP, Port: i.Port, Cluster: i.Cluster, Ephemeral: true,
	}))
}

// refused makes an error of an answer that has none: so the client tells of a refused login.
func refused(ok bool, err error) error {
	if err == nil && !ok {
		err = errors.New("the server refuses it")
	}
	return err
}

func (r *sdkRegistry) watch(group, name string) ([]instance, error) {
	key := [2]string{group, name}
	r.mu.Lock()
	told, watched := r.told[key]
	if !watched {
		r.told[key] = nil
	}
	r.mu.Unlock()
	if watched {
		return told, nil
	}
	err := r.client.Subscribe(&vo.SubscribeParam{GroupName: group, ServiceName: name, SubscribeCallback: func(all []model.Instance, _ error) {
		told := make([]instance, 0, len(all))
		for _, i := range all {
			told = append(told, instance{
				IP: i.Ip, Port: i.Port, Weight: i.Weight, Cluster: i.ClusterName, Metadata: i.Metadata, Unhealthy: !i.Healthy, Disabled: !i.Enable,
			})
		}
		r.mu.Lock()
		defer r.mu.Unlock()
		r.told[key] = told
	}})
	if err != nil {
		r.mu.Lock()
		delete(r.told, key)
		r.mu.Unlock()
		return nil, fmt.Errorf("subscribe: %w", err)
	}
	return nil, nil
}
