package xds

import (
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
)

// metrics are labelled by what the configuration bounds: types that are published, and "other" for what clients ask for
// beside them.
type metrics struct {
	clients   *prometheus.GaugeVec
	responses *prometheus.CounterVec
	bytes     *prometheus.HistogramVec
	nacks     *prometheus.CounterVec
	stale     *prometheus.CounterVec
	resources *prometheus.GaugeVec
	changes   *prometheus.CounterVec
	steps     *prometheus.CounterVec
	ended     prometheus.Counter
}

func newMetrics(reg prometheus.Registerer) *metrics {
	f := promauto.With(reg)
	return &metrics{
		clients: f.NewGaugeVec(prometheus.GaugeOpts{
			Name: "regbridge_xds_clients",
			Help: "Open xDS streams.",
		}, []string{"protocol"}),
		responses: f.NewCounterVec(prometheus.CounterOpts{
			Name: "regbridge_xds_responses_total",
			Help: "Responses sent; kind is full for one that holds every resource, part otherwise.",
		}, []string{"type", "kind"}),
		bytes: f.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "regbridge_xds_full_response_bytes",
			Help:    "Bytes of the resources in a response that holds every resource.",
			Buckets: prometheus.ExponentialBuckets(1<<10, 8, 8), // 1 KiB to 2 GiB
		}, []string{"type"}),
		nacks: f.NewCounterVec(prometheus.CounterOpts{
			Name: "regbridge_xds_nacks_total",
			Help: "Responses that a client refused.",
		}, []string{"type"}),
		stale: f.NewCounterVec(prometheus.CounterOpts{
			Name: "regbridge_xds_stale_requests_total",
			Help: "Requests ignored because they answer a response that is not the last one.",
		}, []string{"type"}),
		resources: f.NewGaugeVec(prometheus.GaugeOpts{
			Name: "regbridge_xds_resources",
			Help: "Resources served.",
		}, []string{"type"}),
		changes: f.NewCounterVec(prometheus.CounterOpts{
			Name: "regbridge_xds_changes_total",
			Help: "Resources that were added, changed or removed.",
		}, []string{"type", "change"}),
		steps: f.NewCounterVec(prometheus.CounterOpts{
			Name: "regbridge_xds_version_steps_total",
			Help: "New versions of a type's resources as a whole.",
		}, []string{"type"}),
		ended: f.NewCounter(prometheus.CounterOpts{
			Name: "regbridge_xds_slow_streams_ended_total",
			Help: "Streams ended because their client was too far behind.",
		}),
	}
}

// otherTypes is the label of all types that are not published.
const otherTypes = "other"

// announce makes all series of a published type, so that they exist before they count.
func (m *metrics) announce(typ string) {
	for _, kind := range []string{"full", "part"} {
		m.responses.WithLabelValues(typ, kind)
	}
	m.bytes.WithLabelValues(typ)
	m.nacks.WithLabelValues(typ)
	m.stale.WithLabelValues(typ)
	m.resources.WithLabelValues(typ)
	for _, change := range []string{"added", "changed", "removed"} {
		m.changes.WithLabelValues(typ, change)
	}
	m.steps.WithLabelValues(typ)
}
