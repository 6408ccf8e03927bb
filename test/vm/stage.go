package vm

import "time"

// A Stage is how far a VM got. Each has a bound, so that a VM that hangs says
// where.
type Stage int

// The stages, in the order in which they come.
const (
	StartingQEMU Stage = iota
	Booting
	SettingUp
	Running
	Finishing
)

func (s Stage) String() string {
	switch s {
	case StartingQEMU:
		return "starting QEMU"
	case Booting:
		return "booting the kernel"
	case SettingUp:
		return "setting up the guest"
	case Running:
		return "running the command"
	case Finishing:
		return "finishing"
	default:
		return "in an unknown stage"
	}
}

// bound is how long stage s may take. Other than for the command it is an
// order of magnitude more than an emulated VM needs on a busy machine.
func (s Stage) bound(cfg Config) time.Duration {
	switch s {
	case StartingQEMU:
		return 30 * time.Second
	case Running:
		return cfg.Timeout
	default:
		return 2 * time.Minute
	}
}
