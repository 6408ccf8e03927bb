package plugin

import (
	"maps"
	"slices"
)

// reload takes a configuration whole, or returns an error and changes nothing.
// Containers that are there already get what the new one gives them.
func (p *plugin) reload() error {
	c, err := p.Load()
	if err != nil {
		return err
	}
	wrapper, err := p.prepare(c)
	if err != nil {
		return err
	}
	p.turn.Lock()
	defer p.turn.Unlock()
	if err := p.apply(c, wrapper); err != nil {
		return err
	}
	p.askAgain()
	if !p.get().synchronized {
		// The runtime will tell of all containers.
		return nil
	}
	var all []*subject
	for _, id := range slices.Sorted(maps.Keys(p.subjects)) {
		all = append(all, p.subjects[id])
	}
	p.reconcile(all)
	return nil
}
