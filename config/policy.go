package config

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"regexp"
	"strings"
)

// Sandbox is what policy knows of a pod sandbox.
type Sandbox struct {
	// ID is the runtime's id of the sandbox.
	ID string
}

// Container is what policy knows of a container.
type Container struct {
	// ID is the runtime's id of the container.
	ID string
	// CgroupsPath is the container's cgroup as the runtime names it.
	CgroupsPath string
}

// idDigits is as many hexadecimal digits of an id as fit into a partition's
// name, which the kernel cuts at 31 bytes: 88 bits, and more than the 13 digits
// that crictl prints.
const idDigits = 22

var (
	runtimeID = regexp.MustCompile(`^[0-9a-f]{64}$`)
	ownName   = regexp.MustCompile(`^sksm-(pod|ctr)-[0-9a-f]{22}$`)
)

// Owned reports whether a partition's name has the shape that [Config.Assign]
// gives. Only such partitions may be removed by us.
func Owned(partition string) bool {
	return ownName.MatchString(partition)
}

// Assign says which partition a container of a sandbox belongs to. Where it
// belongs to none, the partition is empty and the reason says why.
func (c Config) Assign(s Sandbox, ctr Container) (partition, reason string) {
	switch {
	case s.ID == "":
		return "", "the runtime gave no sandbox id"
	case ctr.ID == "":
		return "", "the runtime gave no container id"
	case !strings.HasSuffix(ctr.CgroupsPath, "/"+ctr.ID) && !strings.HasSuffix(ctr.CgroupsPath, ":"+ctr.ID):
		// A cgroup that is not the container's alone would bring the processes of
		// others into its partition.
		return "", fmt.Sprintf("its cgroup %q is not named after the container, so that its processes cannot be told from others", ctr.CgroupsPath)
	}
	if c.PartitionBy == ScopeContainer {
		return "sksm-ctr-" + shortID(ctr.ID), ""
	}
	return "sksm-pod-" + shortID(s.ID), ""
}

// shortID is the beginning of a runtime's id, so that an operator finds a
// partition's pod by it. An id of another form is hashed first.
func shortID(id string) string {
	if !runtimeID.MatchString(id) {
		sum := sha256.Sum256([]byte(id))
		id = hex.EncodeToString(sum[:])
	}
	return id[:idDigits]
}
