package zookeeper

import (
	"testing"

	"github.com/regbridge/regbridge/registry/registrytest"
)

func TestMain(m *testing.M) { registrytest.Main(m) }
