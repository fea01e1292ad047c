package api

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/google/uuid"

	v1 "varve/control/api/customer"
	"varve/control/policy"
	"varve/control/state"
)

// scope reads "cluster", "vpool:NAME" or "vdisk:VPOOL/PATH", if the caller may see it.
func (s *Server) scope(ctx context.Context, given string) (state.Ref, error) {
	kind, name, _ := strings.Cut(given, ":")
	switch {
	case given == "" || given == state.ScopeCluster:
		if callOf(ctx).who.VPools != nil {
			return state.Ref{}, refuse(http.StatusForbidden, "forbidden", "these credentials are bound to some vPools", "")
		}
		return state.ScopeOfCluster(), nil
	case kind == state.ScopeVPool:
		name, err := s.vpoolName(ctx, name)
		if err != nil {
			return state.Ref{}, err
		}
		p, err := s.cfg.Store.View().VPool(name)
		return state.Ref{Kind: state.ScopeVPool, ID: p.ID}, err
	case kind == state.ScopeVDisk:
		d, err := s.vdisk(ctx, name)
		return state.Ref{Kind: state.ScopeVDisk, ID: d.Volume.ID}, err
	}
	return state.Ref{}, refuse(http.StatusBadRequest, "invalid", "scope "+clip(given)+" is none", "write cluster, vpool:NAME or vdisk:VPOOL/PATH")
}

// scopeName is the inverse of scope; a scope whose object is gone is named by its id.
func (s *Server) scopeName(at state.Ref) string {
	v := s.cfg.Store.View()
	switch at.Kind {
	case state.ScopeVPool:
		if p, err := v.VPoolByID(at.ID); err == nil {
			return "vpool:" + p.Name
		}
	case state.ScopeVDisk:
		vol, err := v.Volume(at.ID)
		p, perr := v.VPoolByID(vol.Pool)
		file, ferr := v.Path(vol.FSID, vol.Ino)
		if errors.Join(err, perr, ferr) == nil {
			disk, _ := state.DiskName(file)
			return "vdisk:" + p.Name + "/" + strings.TrimPrefix(disk, "/")
		}
	case state.ScopeCluster:
		return state.ScopeCluster
	}
	return at.Kind + ":" + at.ID.String()
}

// optionalMatch is If-Match where what is to be set may not be there yet.
func optionalMatch(header, object string, present uint64) (uint64, error) {
	if header == "" && present == 0 {
		return 0, nil
	}
	return based(header, object, present)
}

func (a customerAPI) ListSchedules(ctx context.Context, _ v1.ListSchedulesRequestObject) (v1.ListSchedulesResponseObject, error) {
	var all []v1.Schedule
	for _, st := range a.cfg.Schedules.List() {
		out := v1.Schedule{Name: st.Entry.Name, Scope: a.scopeName(st.Scope), Task: st.Entry.Task, Cron: st.Spec.Cron, Zone: orElse(st.Spec.Zone, "UTC"),
			Enabled: !st.Spec.Disabled, Inherited: st.Default, Purpose: st.Entry.Why, Last: wallTime(st.Last), Next: wallTime(st.Next), Rev: st.Rev}
		if st.Task != uuid.Nil {
			out.LastTask = st.Task.String()
		}
		if st.Err != nil {
			out.Error = st.Err.Error()
		}
		all = append(all, out)
	}
	page, err := listPage(ctx, all, func(s v1.Schedule) string { return s.Name + " " + s.Scope })
	return v1.ListSchedules200JSONResponse{Items: page.items, Next: page.next, Count: page.count}, err
}

func wallTime(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	t = t.UTC()
	return &t
}

// schedule gives the rev of a schedule's row on a scope, 0 where there is none.
func (s *Server) scheduleRev(name string, at state.Ref) uint64 {
	row, _ := s.cfg.Store.View().Schedule(name, at)
	return row.Rev
}

func (a customerAPI) SetSchedule(ctx context.Context, r v1.SetScheduleRequestObject) (v1.SetScheduleResponseObject, error) {
	at, err := a.scope(ctx, r.Params.Scope)
	if err != nil {
		return nil, err
	}
	object := "schedule " + r.Schedule + " on " + a.scopeName(at)
	about(ctx, object)
	rev, err := optionalMatch(r.Params.IfMatch, object, a.scheduleRev(r.Schedule, at))
	if err != nil {
		return nil, err
	}
	if r.Params.DryRun {
		return nil, wouldDo("sets "+object, []string{"cron: " + orElse(r.Body.Cron, "its own")}, nil, nil, "")
	}
	return v1.SetSchedule204Response{}, a.cfg.Schedules.Set(ctx, r.Schedule, at, rev, state.ScheduleSpec{Cron: r.Body.Cron, Zone: r.Body.Zone,
		Disabled: r.Body.Disabled, Task: r.Body.Task, Args: r.Body.Args})
}

func (a customerAPI) InheritSchedule(ctx context.Context, r v1.InheritScheduleRequestObject) (v1.InheritScheduleResponseObject, error) {
	at, err := a.scope(ctx, r.Params.Scope)
	if err != nil {
		return nil, err
	}
	object := "schedule " + r.Schedule + " on " + a.scopeName(at)
	about(ctx, object)
	rev, err := based(r.Params.IfMatch, object, a.scheduleRev(r.Schedule, at))
	if err != nil {
		return nil, err
	}
	if r.Params.DryRun {
		return nil, wouldDo("takes "+object+" away", []string{"the wider scope's holds again"}, nil, nil, "")
	}
	return v1.InheritSchedule204Response{}, a.cfg.Schedules.Inherit(ctx, r.Schedule, at, rev)
}

func (a customerAPI) RunSchedule(ctx context.Context, r v1.RunScheduleRequestObject) (v1.RunScheduleResponseObject, error) {
	at, err := a.scope(ctx, r.Params.Scope)
	if err != nil {
		return nil, err
	}
	about(ctx, "schedule "+r.Schedule+" on "+a.scopeName(at))
	if r.Params.DryRun {
		return nil, wouldDo("starts the task of schedule "+r.Schedule, nil, nil, nil, "")
	}
	id, err := a.cfg.Schedules.RunNow(ctx, r.Schedule, at, callOf(ctx).who.Who())
	if err != nil {
		return nil, err
	}
	t, err := a.cfg.Store.View().Task(id)
	return v1.RunSchedule202JSONResponse{Body: a.toTask(t), Headers: v1.RunSchedule202ResponseHeaders{Location: location("tasks", id.String())}}, err
}

func (s *Server) policies() *policy.Controller {
	return &policy.Controller{Raft: s.cfg.Raft, Store: s.cfg.Store}
}

func (a customerAPI) ListPolicies(ctx context.Context, _ v1.ListPoliciesRequestObject) (v1.ListPoliciesResponseObject, error) {
	var all []v1.Policy
	for _, p := range a.cfg.Store.View().Policies() {
		all = append(all, v1.Policy{Scope: a.scopeName(p.Scope), Set: p.PolicySpec, Modified: utc(p.Modified), Rev: p.Rev})
	}
	page, err := listPage(ctx, all, func(p v1.Policy) string { return p.Scope })
	return v1.ListPolicies200JSONResponse{Items: page.items, Next: page.next, Count: page.count}, err
}

func (s *Server) policyView(at state.Ref) (v1.PolicyView, error) {
	v := s.cfg.Store.View()
	out := v1.PolicyView{Scope: s.scopeName(at)}
	if p, ok := v.Policy(at); ok {
		out.Set, out.Rev = p.PolicySpec, p.Rev
	}
	switch at.Kind {
	case state.ScopeVDisk:
		vol, err := v.Volume(at.ID)
		if err != nil {
			return out, err
		}
		out.Effective = policy.OfVDisk(v, vol)
	case state.ScopeVPool:
		out.Effective = policy.OfVPool(v, at.ID)
	default:
		out.Effective = policy.OfCluster(v)
	}
	return out, nil
}

func (a customerAPI) GetPolicy(ctx context.Context, r v1.GetPolicyRequestObject) (v1.GetPolicyResponseObject, error) {
	at, err := a.scope(ctx, r.Scope)
	if err != nil {
		return nil, err
	}
	p, err := a.policyView(at)
	return v1.GetPolicy200JSONResponse{Body: p, Headers: v1.GetPolicy200ResponseHeaders{ETag: etag(p.Rev)}}, err
}

func (a customerAPI) SetPolicy(ctx context.Context, r v1.SetPolicyRequestObject) (v1.SetPolicyResponseObject, error) {
	at, err := a.scope(ctx, r.Scope)
	if err != nil {
		return nil, err
	}
	object := "policy of " + a.scopeName(at)
	about(ctx, object)
	have, _ := a.cfg.Store.View().Policy(at)
	rev, err := optionalMatch(r.Params.IfMatch, object, have.Rev)
	if err != nil {
		return nil, err
	}
	if r.Params.DryRun {
		return nil, wouldDo("replaces what "+a.scopeName(at)+" sets", nil, nil, nil, "")
	}
	if err := a.policies().Set(ctx, at, rev, *r.Body); err != nil {
		return nil, err
	}
	p, err := a.policyView(at)
	return v1.SetPolicy200JSONResponse{Body: p, Headers: v1.SetPolicy200ResponseHeaders{ETag: etag(p.Rev)}}, err
}

func (a customerAPI) InheritPolicy(ctx context.Context, r v1.InheritPolicyRequestObject) (v1.InheritPolicyResponseObject, error) {
	at, err := a.scope(ctx, r.Scope)
	if err != nil {
		return nil, err
	}
	object := "policy of " + a.scopeName(at)
	about(ctx, object)
	have, ok := a.cfg.Store.View().Policy(at)
	if !ok {
		return nil, unseen(object)
	}
	rev, err := based(r.Params.IfMatch, object, have.Rev)
	if err != nil {
		return nil, err
	}
	if r.Params.DryRun {
		return nil, wouldDo("takes away what "+a.scopeName(at)+" sets", []string{"the wider scope's holds again"}, nil, nil, "")
	}
	return v1.InheritPolicy204Response{}, a.policies().Inherit(ctx, at, rev)
}

func toConfig(k state.ConfigKey) v1.ConfigKey {
	out := v1.ConfigKey{Key: k.Key, Value: k.Value, Version: k.Version, By: k.By, At: utc(k.At), Rev: k.Rev}
	for _, f := range k.Former {
		out.Former = append(out.Former, v1.ConfigValue{Value: f.Value, Version: f.Version, By: f.By, At: utc(f.At)})
	}
	return out
}

func (a customerAPI) ListConfig(ctx context.Context, _ v1.ListConfigRequestObject) (v1.ListConfigResponseObject, error) {
	var all []v1.ConfigKey
	for _, k := range a.cfg.Store.View().Configs() {
		all = append(all, toConfig(k))
	}
	page, err := listPage(ctx, all, func(k v1.ConfigKey) string { return k.Key })
	return v1.ListConfig200JSONResponse{Items: page.items, Next: page.next, Count: page.count}, err
}

func (a customerAPI) GetConfig(_ context.Context, r v1.GetConfigRequestObject) (v1.GetConfigResponseObject, error) {
	k, err := a.cfg.Store.View().Config(r.Key)
	return v1.GetConfig200JSONResponse{Body: toConfig(k), Headers: v1.GetConfig200ResponseHeaders{ETag: etag(k.Rev)}}, err
}

func (a customerAPI) SetConfig(ctx context.Context, r v1.SetConfigRequestObject) (v1.SetConfigResponseObject, error) {
	about(ctx, "config "+r.Key)
	have, err := a.cfg.Store.View().Config(r.Key)
	if err != nil && !errors.Is(err, state.ErrNotFound) {
		return nil, err
	}
	rev, err := optionalMatch(r.Params.IfMatch, "config "+r.Key, have.Rev)
	if err != nil {
		return nil, err
	}
	if a.cfg.CheckConfig != nil {
		if err := a.cfg.CheckConfig(r.Key, r.Body.Value); err != nil {
			return nil, err
		}
	}
	if r.Params.DryRun {
		return nil, wouldDo("sets "+r.Key, []string{fmt.Sprintf("%q instead of %q", clip(r.Body.Value), clip(have.Value))}, nil, nil, "")
	}
	if _, err := a.cfg.Raft.Apply(ctx, &state.SetConfig{Key: r.Key, Value: r.Body.Value, By: callOf(ctx).who.Who(), Rev: rev}); err != nil {
		return nil, err
	}
	k, err := a.cfg.Store.View().Config(r.Key)
	return v1.SetConfig200JSONResponse{Body: toConfig(k), Headers: v1.SetConfig200ResponseHeaders{ETag: etag(k.Rev)}}, err
}

func (a customerAPI) UnsetConfig(ctx context.Context, r v1.UnsetConfigRequestObject) (v1.UnsetConfigResponseObject, error) {
	about(ctx, "config "+r.Key)
	have, err := a.cfg.Store.View().Config(r.Key)
	if err != nil {
		return nil, err
	}
	rev, err := based(r.Params.IfMatch, "config "+r.Key, have.Rev)
	if err != nil {
		return nil, err
	}
	if r.Params.DryRun {
		return nil, wouldDo("takes "+r.Key+" away", []string{"what holds without it holds again"}, nil, nil, "")
	}
	_, err = a.cfg.Raft.Apply(ctx, &state.DeleteConfig{Key: r.Key, Rev: rev})
	return v1.UnsetConfig204Response{}, err
}

func toDomain(d state.Domain) v1.Domain {
	return v1.Domain{Name: d.Name, ID: d.ID, Created: utc(d.Created), Rev: d.Rev}
}

// named finds an object by id or by name.
func named[T any](given string, byID func(uuid.UUID) (T, error), byName func(string) (T, error)) (T, error) {
	if id, err := uuid.Parse(given); err == nil {
		return byID(id)
	}
	return byName(given)
}

func (s *Server) domain(given string) (state.Domain, error) {
	v := s.cfg.Store.View()
	return named(given, v.Domain, v.DomainByName)
}

func (a customerAPI) ListDomains(ctx context.Context, _ v1.ListDomainsRequestObject) (v1.ListDomainsResponseObject, error) {
	var all []v1.Domain
	for _, d := range a.cfg.Store.View().Domains() {
		all = append(all, toDomain(d))
	}
	page, err := listPage(ctx, all, func(d v1.Domain) string { return d.ID.String() })
	return v1.ListDomains200JSONResponse{Items: page.items, Next: page.next, Count: page.count}, err
}

func (a customerAPI) CreateDomain(ctx context.Context, r v1.CreateDomainRequestObject) (v1.CreateDomainResponseObject, error) {
	about(ctx, "domain "+r.Body.Name)
	if r.Params.DryRun {
		return nil, wouldDo("makes domain "+r.Body.Name, nil, nil, nil, "")
	}
	id := uuid.New()
	if _, err := a.cfg.Raft.Apply(ctx, &state.SetDomain{ID: id, Name: r.Body.Name}); err != nil {
		return nil, err
	}
	d, err := a.cfg.Store.View().Domain(id)
	return v1.CreateDomain201JSONResponse{Body: toDomain(d), Headers: v1.CreateDomain201ResponseHeaders{ETag: etag(d.Rev), Location: location("domains", d.Name)}}, err
}

func (a customerAPI) PatchDomain(ctx context.Context, r v1.PatchDomainRequestObject) (v1.PatchDomainResponseObject, error) {
	d, err := a.domain(r.Domain)
	if err != nil {
		return nil, err
	}
	about(ctx, "domain "+d.Name)
	rev, err := based(r.Params.IfMatch, "domain "+d.Name, d.Rev)
	if err != nil {
		return nil, err
	}
	if r.Params.DryRun {
		return nil, wouldDo("renames domain "+d.Name, []string{"to " + r.Body.Name}, nil, nil, "")
	}
	if _, err := a.cfg.Raft.Apply(ctx, &state.SetDomain{ID: d.ID, Name: r.Body.Name, Rev: rev}); err != nil {
		return nil, err
	}
	d, err = a.cfg.Store.View().Domain(d.ID)
	return v1.PatchDomain200JSONResponse{Body: toDomain(d), Headers: v1.PatchDomain200ResponseHeaders{ETag: etag(d.Rev)}}, err
}

func (a customerAPI) DeleteDomain(ctx context.Context, r v1.DeleteDomainRequestObject) (v1.DeleteDomainResponseObject, error) {
	d, err := a.domain(r.Domain)
	if err != nil {
		return nil, err
	}
	about(ctx, "domain "+d.Name)
	rev, err := based(r.Params.IfMatch, "domain "+d.Name, d.Rev)
	if err != nil {
		return nil, err
	}
	if r.Params.DryRun {
		return nil, wouldDo("deletes domain "+d.Name, nil, []string{"the domain"}, nil, d.Name)
	}
	if err := confirm(r.Params.Confirm, d.Name); err != nil {
		return nil, err
	}
	_, err = a.cfg.Raft.Apply(ctx, &state.DeleteDomain{ID: d.ID, Rev: rev})
	return v1.DeleteDomain204Response{}, err
}

func toBranding(b state.Branding) v1.Branding {
	return v1.Branding{Name: b.Name, ID: b.ID, Product: b.Product, Colour: b.Colour, Logo: b.Logo, Default: b.Default, Rev: b.Rev}
}

func (s *Server) branding(given string) (state.Branding, error) {
	v := s.cfg.Store.View()
	return named(given, v.Branding, func(name string) (state.Branding, error) {
		for _, b := range v.Brandings() {
			if b.Name == name {
				return b, nil
			}
		}
		return state.Branding{}, unseen("branding " + clip(name))
	})
}

func (a customerAPI) ListBrandings(ctx context.Context, _ v1.ListBrandingsRequestObject) (v1.ListBrandingsResponseObject, error) {
	var all []v1.Branding
	for _, b := range a.cfg.Store.View().Brandings() {
		all = append(all, toBranding(b))
	}
	page, err := listPage(ctx, all, func(b v1.Branding) string { return b.ID.String() })
	return v1.ListBrandings200JSONResponse{Items: page.items, Next: page.next, Count: page.count}, err
}

func (s *Server) setBranding(ctx context.Context, id uuid.UUID, rev uint64, in v1.BrandingSet) (state.Branding, error) {
	if _, err := s.cfg.Raft.Apply(ctx, &state.SetBranding{ID: id, Rev: rev, Name: in.Name, Product: in.Product, Colour: in.Colour, Logo: in.Logo,
		Default: in.Default}); err != nil {
		return state.Branding{}, err
	}
	return s.cfg.Store.View().Branding(id)
}

func (a customerAPI) CreateBranding(ctx context.Context, r v1.CreateBrandingRequestObject) (v1.CreateBrandingResponseObject, error) {
	about(ctx, "branding "+r.Body.Name)
	if r.Params.DryRun {
		return nil, wouldDo("makes branding "+r.Body.Name, nil, nil, nil, "")
	}
	b, err := a.setBranding(ctx, uuid.New(), 0, *r.Body)
	return v1.CreateBranding201JSONResponse{Body: toBranding(b), Headers: v1.CreateBranding201ResponseHeaders{ETag: etag(b.Rev),
		Location: location("brandings", b.Name)}}, err
}

func (a customerAPI) SetBranding(ctx context.Context, r v1.SetBrandingRequestObject) (v1.SetBrandingResponseObject, error) {
	b, err := a.branding(r.Branding)
	if err != nil {
		return nil, err
	}
	about(ctx, "branding "+b.Name)
	rev, err := based(r.Params.IfMatch, "branding "+b.Name, b.Rev)
	if err != nil {
		return nil, err
	}
	if r.Params.DryRun {
		return nil, wouldDo("replaces branding "+b.Name, nil, nil, nil, "")
	}
	b, err = a.setBranding(ctx, b.ID, rev, *r.Body)
	return v1.SetBranding200JSONResponse{Body: toBranding(b), Headers: v1.SetBranding200ResponseHeaders{ETag: etag(b.Rev)}}, err
}

func (a customerAPI) DeleteBranding(ctx context.Context, r v1.DeleteBrandingRequestObject) (v1.DeleteBrandingResponseObject, error) {
	b, err := a.branding(r.Branding)
	if err != nil {
		return nil, err
	}
	about(ctx, "branding "+b.Name)
	rev, err := based(r.Params.IfMatch, "branding "+b.Name, b.Rev)
	if err != nil {
		return nil, err
	}
	if r.Params.DryRun {
		return nil, wouldDo("deletes branding "+b.Name, nil, []string{"the branding"}, nil, b.Name)
	}
	if err := confirm(r.Params.Confirm, b.Name); err != nil {
		return nil, err
	}
	_, err = a.cfg.Raft.Apply(ctx, &state.DeleteBranding{ID: b.ID, Rev: rev})
	return v1.DeleteBranding204Response{}, err
}

func (s *Server) toSink(k state.Sink) v1.Sink {
	st := s.cfg.Sinks.Status(k.ID)
	return v1.Sink{Name: k.Name, ID: k.ID, Kind: k.Kind, URL: k.URL, CA: k.CA, Exchange: k.Exchange, Topics: notNil(k.Topics), Types: notNil(k.Types),
		Local: k.Local, Enabled: !k.Disabled, Sent: st.Sent, Failing: wallTime(st.Failing), Error: st.Error, Missed: st.Missed,
		Created: utc(k.Created), Rev: k.Rev}
}

func (s *Server) sink(given string) (state.Sink, error) {
	v := s.cfg.Store.View()
	return named(given, v.Sink, v.SinkByName)
}

func (a customerAPI) ListSinks(ctx context.Context, _ v1.ListSinksRequestObject) (v1.ListSinksResponseObject, error) {
	var all []v1.Sink
	for _, k := range a.cfg.Store.View().Sinks() {
		all = append(all, a.toSink(k))
	}
	page, err := listPage(ctx, all, func(k v1.Sink) string { return k.ID.String() })
	return v1.ListSinks200JSONResponse{Items: page.items, Next: page.next, Count: page.count}, err
}

func sinkSpec(in v1.SinkSet) (state.SinkSpec, []byte) {
	var secret []byte
	if in.Secret != "" {
		secret = []byte(in.Secret)
	}
	return state.SinkSpec{Name: in.Name, Kind: in.Kind, URL: in.URL, CA: in.CA, Exchange: in.Exchange, Topics: in.Topics, Types: in.Types,
		Local: in.Local, Disabled: in.Disabled}, secret
}

func (a customerAPI) CreateSink(ctx context.Context, r v1.CreateSinkRequestObject) (v1.CreateSinkResponseObject, error) {
	about(ctx, "sink "+r.Body.Name)
	spec, secret := sinkSpec(*r.Body)
	if r.Params.DryRun {
		return nil, wouldDo("sends events to "+spec.URL, nil, nil, nil, "")
	}
	id, shown, err := a.cfg.Sinks.Set(ctx, uuid.Nil, 0, spec, secret)
	if err != nil {
		return nil, err
	}
	k, err := a.cfg.Store.View().Sink(id)
	return v1.CreateSink201JSONResponse{Body: v1.SinkSecret{Sink: a.toSink(k), Secret: shown},
		Headers: v1.CreateSink201ResponseHeaders{ETag: etag(k.Rev), Location: location("sinks", k.Name)}}, err
}

func (a customerAPI) SetSink(ctx context.Context, r v1.SetSinkRequestObject) (v1.SetSinkResponseObject, error) {
	k, err := a.sink(r.Sink)
	if err != nil {
		return nil, err
	}
	about(ctx, "sink "+k.Name)
	rev, err := based(r.Params.IfMatch, "sink "+k.Name, k.Rev)
	if err != nil {
		return nil, err
	}
	spec, secret := sinkSpec(*r.Body)
	if r.Params.DryRun {
		return nil, wouldDo("replaces sink "+k.Name, []string{"events go to " + spec.URL}, nil, nil, "")
	}
	if _, _, err := a.cfg.Sinks.Set(ctx, k.ID, rev, spec, secret); err != nil {
		return nil, err
	}
	k, err = a.cfg.Store.View().Sink(k.ID)
	return v1.SetSink200JSONResponse{Body: a.toSink(k), Headers: v1.SetSink200ResponseHeaders{ETag: etag(k.Rev)}}, err
}

func (a customerAPI) DeleteSink(ctx context.Context, r v1.DeleteSinkRequestObject) (v1.DeleteSinkResponseObject, error) {
	k, err := a.sink(r.Sink)
	if err != nil {
		return nil, err
	}
	about(ctx, "sink "+k.Name)
	rev, err := based(r.Params.IfMatch, "sink "+k.Name, k.Rev)
	if err != nil {
		return nil, err
	}
	if r.Params.DryRun {
		return nil, wouldDo("deletes sink "+k.Name, nil, []string{"its place in the events, and its secret"}, []string{"whoever listens at " + k.URL}, k.Name)
	}
	if err := confirm(r.Params.Confirm, k.Name); err != nil {
		return nil, err
	}
	return v1.DeleteSink204Response{}, a.cfg.Sinks.Delete(ctx, k.ID, rev)
}
