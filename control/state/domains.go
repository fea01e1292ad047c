package state

import (
	"fmt"

	"github.com/google/uuid"
)

// Domain is a failure domain: nodes that one event can take together. A node has regular domains, where it stands, and
// recovery domains, where its volumes' logs are copied first.
type Domain struct {
	ID      uuid.UUID `json:"id"`
	Name    string    `json:"name"`
	Created Time      `json:"created"`
	Rev     uint64    `json:"rev"`
}

// DomainsMax bounds a cluster's domains.
const DomainsMax = 256

const tDomain = "domain"

func domainTable(frame byte) object {
	o := rowObject[Domain](frame, tDomain, map[string]index{
		byID:   always(func(d *Domain) []byte { return d.ID[:] }),
		byName: always(func(d *Domain) []byte { return []byte(d.Name) }),
	})
	o.commands = []func() Command{command[SetDomain], command[DeleteDomain]}
	return o
}

// SetDomain makes a domain, or renames it.
type SetDomain struct {
	ID   uuid.UUID `json:"id"`
	Name string    `json:"name"`
	Rev  uint64    `json:"rev,omitempty"`
}

func (*SetDomain) kind() (string, int) { return "set_domain", 1 }

func (c *SetDomain) check() error {
	if c.ID == uuid.Nil {
		return invalid("domain "+quote(c.Name), "no id")
	}
	return checkLabel("domain", c.Name)
}

func (c *SetDomain) apply(t *tx) (Result, error) {
	object := "domain " + quote(c.Name)
	d := Domain{ID: c.ID, Created: t.at}
	have, found := first[Domain](&t.View, tDomain, byID, c.ID[:])
	switch {
	case found:
		d = *have
		if err := fresh(object, c.Rev, d.Rev); err != nil {
			return Result{}, err
		}
	case c.Rev != 0:
		return Result{}, missing(object)
	case count[Domain](&t.View, tDomain, byID, nil) >= DomainsMax:
		return Result{}, &Error{Err: ErrNoSpace, Object: object, Detail: fmt.Sprintf("%d domains", DomainsMax)}
	}
	if other, ok := first[Domain](&t.View, tDomain, byName, []byte(c.Name)); ok && other.ID != c.ID {
		return Result{}, &Error{Err: ErrExist, Object: object}
	}
	d.Name, d.Rev = c.Name, t.index
	t.put(tDomain, &d)
	return Result{Object: d.ID, Created: !found}, nil
}

// DeleteDomain takes a domain away that nothing stands in.
type DeleteDomain struct {
	ID  uuid.UUID `json:"id"`
	Rev uint64    `json:"rev,omitempty"`
}

func (*DeleteDomain) kind() (string, int) { return "delete_domain", 1 }

func (c *DeleteDomain) check() error { return nil }

func (c *DeleteDomain) apply(t *tx) (Result, error) {
	d, err := t.Domain(c.ID)
	if err != nil {
		return Result{}, err
	}
	object := "domain " + quote(d.Name)
	if err := fresh(object, c.Rev, d.Rev); err != nil {
		return Result{}, err
	}
	if err := t.free(Ref{Kind: tDomain, ID: c.ID}, object); err != nil {
		return Result{}, err
	}
	t.del(tDomain, &d)
	return Result{Object: c.ID}, nil
}

// Domain returns one domain.
func (v *View) Domain(id uuid.UUID) (Domain, error) {
	d, ok := first[Domain](v, tDomain, byID, id[:])
	if !ok {
		return Domain{}, missing("domain " + id.String())
	}
	return *d, nil
}

// DomainByName returns the domain of this name.
func (v *View) DomainByName(name string) (Domain, error) {
	d, ok := first[Domain](v, tDomain, byName, []byte(name))
	if !ok {
		return Domain{}, missing("domain " + quote(name))
	}
	return *d, nil
}

// Domains returns all domains, by name.
func (v *View) Domains() []Domain { return all[Domain](v, tDomain, byName, nil) }
