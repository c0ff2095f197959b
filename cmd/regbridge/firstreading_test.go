package main

import (
	"context"
	"slices"
	"testing"
	"time"

	"github.com/regbridge/regbridge/bridge"
	"github.com/regbridge/regbridge/registry"
)

// given is a source that gives one configuration.
type given bridge.Config

func (g given) Run(_ context.Context, apply func(bridge.Config)) error {
	apply(bridge.Config(g))
	return nil
}

// A registry is given up when it has failed twice, and with each of its servers, and no other one can still be read.
func TestGivesUpWhatFails(t *testing.T) {
	begun := time.Now()
	status := func(name string, state bridge.State, failures int) bridge.Status {
		at := begun.Add(time.Duration(failures) * time.Second)
		return bridge.Status{Key: bridge.Key{Type: "consul", Name: name}, State: state, LastErrorTime: &at}
	}
	var config bridge.Config
	for name, domain := range map[string]string{"one": "a", "three": "a,b,c", "good": "a"} {
		config.Registries = append(config.Registries, bridge.RegistryConfig{
			Key: bridge.Key{Type: "consul", Name: name}, Entry: registry.Entry{Type: "consul", Name: name, Domain: domain},
		})
	}
	f := firstReading{from: given(config)}
	var applied [][]bridge.Key
	if err := f.Run(t.Context(), func(c bridge.Config) {
		var keys []bridge.Key
		for _, rc := range c.Registries {
			keys = append(keys, rc.Key)
		}
		applied = append(applied, keys)
	}); err != nil {
		t.Fatal(err)
	}
	good := bridge.StateConnecting
	for failures := 1; failures <= 5; failures++ {
		statuses := []bridge.Status{
			status("one", bridge.StateFailing, failures), status("three", bridge.StateFailing, min(failures, 3)), status("good", good, 0),
		}
		for range 3 { // without a further failure
			if got := f.giveUp(statuses); (got != nil) != (failures == 5) {
				t.Fatalf("after %d failures: %v", failures, got)
			} else if got != nil {
				break
			}
		}
		if failures == 4 {
			good = bridge.StateSynced
		}
	}
	if len(applied) != 2 || !slices.Equal(applied[1], []bridge.Key{{Type: "consul", Name: "good"}}) {
		t.Errorf("applied: %v", applied)
	}

	partly := status("three", bridge.StateFailing, 9)
	partly.Services = 1
	for n := range 9 {
		one := status("one", bridge.StateFailing, n)
		if got := f.giveUp([]bridge.Status{one, partly, status("good", good, 0)}); got != nil {
			t.Errorf("a registry that was read in part is given up: %v", got)
		}
	}
}
