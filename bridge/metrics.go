package bridge

import (
	"context"
	"errors"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics are what Prometheus is told; docs/metrics.md explains each. Labels are the registry (namespace/bridge/type/name)
// and its type, and small fixed sets; never a service or a client.
type metrics struct {
	steps    prometheus.Counter
	requests *prometheus.CounterVec
	duration *prometheus.HistogramVec
}

func newMetrics(b *Bridge, reg prometheus.Registerer) *metrics {
	m := &metrics{
		steps: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "regbridge_publish_steps_total", Help: "Version steps, each with all changes since the one before.",
		}),
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "regbridge_registry_requests_total", Help: "Requests to registries, by how they ended.",
		}, []string{"registry", "type", "operation", "outcome"}),
		duration: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "regbridge_registry_request_duration_seconds", Help: "How long requests to registries took, long polls included.",
			Buckets: []float64{.001, .005, .01, .05, .1, .5, 1, 5, 10, 60, 300},
		}, []string{"registry", "type", "operation"}),
	}
	if reg != nil {
		reg.MustRegister(m.steps, m.requests, m.duration, statusCollector{b})
	}
	return m
}

func (m *metrics) request(key Key, operation string, took time.Duration, err error) {
	outcome := "ok"
	switch {
	case errors.Is(err, context.Canceled):
		outcome = "cancelled"
	case errors.Is(err, context.DeadlineExceeded):
		outcome = "timeout"
	case err != nil:
		outcome = "error"
	}
	m.requests.WithLabelValues(key.String(), key.Type, operation, outcome).Inc()
	m.duration.WithLabelValues(key.String(), key.Type, operation).Observe(took.Seconds())
}

// forget deletes the series of a registry that is gone.
func (m *metrics) forget(key Key) {
	m.requests.DeletePartialMatch(prometheus.Labels{"registry": key.String()})
	m.duration.DeletePartialMatch(prometheus.Labels{"registry": key.String()})
}

// statusCollector reads the gauges of all registries when they are asked for.
type statusCollector struct{ b *Bridge }

var perRegistry = []string{"registry", "type"}

var (
	descState = prometheus.NewDesc("regbridge_registry_state",
		"1 for the state that the registry is in: synced, failing, connecting, blocked or invalid.", append(perRegistry, "state"), nil)
	descLastSync = prometheus.NewDesc("regbridge_registry_last_sync_timestamp_seconds",
		"When the registry was last read completely; 0 if never.", perRegistry, nil)
	descServices  = prometheus.NewDesc("regbridge_registry_services", "Services that the registry lists.", perRegistry, nil)
	descInstances = prometheus.NewDesc("regbridge_registry_instances", "Instances that the registry lists.", perRegistry, nil)
	descPublished = prometheus.NewDesc("regbridge_registry_endpoints",
		"Endpoints of the registry in the mesh: listed ones, and those that are only held.", append(perRegistry, "kind"), nil)
	descLeftOut = prometheus.NewDesc("regbridge_registry_left_out",
		"Instances that are not published, by reason.", append(perRegistry, "reason"), nil)
	descFailed  = prometheus.NewDesc("regbridge_registry_failed_services", "Services that could not be read.", perRegistry, nil)
	descMesh    = prometheus.NewDesc("regbridge_services", "Services in the mesh.", nil, nil)
	descPoison  = prometheus.NewDesc("regbridge_quarantined_services", "Services that the mesh would refuse as they are now.", nil, nil)
	descConfig  = prometheus.NewDesc("regbridge_config_problems", "Findings in the configuration.", []string{"severity"}, nil)
	descConfErr = prometheus.NewDesc("regbridge_config_read_failed", "1 while the configuration cannot be read.", nil, nil)
	descReady   = prometheus.NewDesc("regbridge_ready", "1 once first answers go out.", nil, nil)
)

func (statusCollector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{
		descState, descLastSync, descServices, descInstances, descPublished, descLeftOut, descFailed, descMesh, descPoison, descConfig,
		descConfErr, descReady,
	} {
		ch <- d
	}
}

func (c statusCollector) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, l ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, l...)
	}
	for _, s := range c.b.Statuses() {
		r := []string{s.Registry, s.Type}
		gauge(descState, 1, s.Registry, s.Type, string(s.State))
		synced := 0.0
		if s.LastSync != nil {
			synced = float64(s.LastSync.UnixMilli()) / 1000
		}
		gauge(descLastSync, synced, r...)
		gauge(descServices, float64(s.Services), r...)
		gauge(descInstances, float64(s.Instances), r...)
		gauge(descPublished, float64(s.Published), s.Registry, s.Type, "listed")
		gauge(descPublished, float64(s.Held), s.Registry, s.Type, "held")
		gauge(descFailed, float64(len(s.FailedServices)), r...)
		for reason, n := range s.LeftOut {
			gauge(descLeftOut, float64(n), s.Registry, s.Type, string(reason))
		}
	}
	services, quarantined := c.b.publisher.counts()
	gauge(descMesh, float64(services))
	gauge(descPoison, float64(quarantined))
	problems, err := c.b.Problems()
	var errs, warnings float64
	for _, p := range problems {
		if p.Warning {
			warnings++
		} else {
			errs++
		}
	}
	gauge(descConfig, errs, "error")
	gauge(descConfig, warnings, "warning")
	gauge(descConfErr, boolean(err != nil))
	ready, _ := c.b.Ready()
	gauge(descReady, boolean(ready))
}

func boolean(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// counts returns how many services are published, and how many are quarantined.
func (p *publisher) counts() (services, quarantined int) {
	for _, h := range p.services() {
		if len(h.resources) > 0 {
			services++
		}
		if h.quarantined != nil {
			quarantined++
		}
	}
	return services, quarantined
}
