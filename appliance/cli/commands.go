package cli

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"
	"github.com/spf13/pflag"
	"golang.org/x/term"

	"varve/control/api/client"
	v1 "varve/control/api/customer"
)

// at makes a path of constant parts, with arguments where "$" stands.
func at(parts ...string) func([]string) []string {
	return func(args []string) []string {
		out := make([]string, len(parts))
		n := 0
		for i, p := range parts {
			if out[i] = p; p == "$" {
				out[i] = args[n]
				n++
			}
		}
		return out
	}
}

func firstArg(args []string) string { return args[0] }

// group is a command that only holds others.
func group(use, short string, commands ...*cobra.Command) *cobra.Command {
	c := &cobra.Command{Use: use, Short: short}
	c.AddCommand(commands...)
	return c
}

// named is a body of one field.
func named(field string, i int) func([]string) (any, error) {
	return func(args []string) (any, error) { return map[string]string{field: args[i]}, nil }
}

// accessCommands are users, groups, roles, clients, tokens and the audit log.
func (e *env) accessCommands() []*cobra.Command {
	var user v1.UserCreate
	var edit struct {
		roles, groups          []string
		fullName               string
		password, disable      bool
		enable, resetTOTP, all bool
	}
	var apiClient v1.ClientCreate
	var token v1.TokenCreate
	var lasts time.Duration
	var groupRoles []string
	var set *pflag.FlagSet
	roles := func(s *pflag.FlagSet, into *[]string) {
		s.StringSliceVar(into, "role", nil, "`ROLE`: viewer, operator, storage-admin, security-admin or admin; repeatable")
	}
	return []*cobra.Command{
		group("user", "Users",
			e.listing(listing{use: "list", short: "List the users", path: fixed("users"), columns: []string{"name", "full_name", "roles", "groups", "disabled", "totp", "source"}}),
			e.verb(verb{use: "show NAME", short: "Show one user", args: []string{"NAME"}, method: http.MethodGet, path: at("users", "$")}),
			e.verb(verb{use: "create NAME --role ROLE", short: "Make a user", args: []string{"NAME"}, method: http.MethodPost, path: at("users"),
				long: "Make a user. The password is asked for on a terminal, else it is the first line of standard input.",
				body: func(args []string) (any, error) {
					var err error
					user.Name = args[0]
					user.Password, err = e.secretLine("Password of " + args[0])
					return user, err
				}, flags: func(s *pflag.FlagSet) {
					roles(s, &user.Roles)
					s.StringSliceVar(&user.Groups, "group", nil, "`GROUP` that it is in; repeatable")
					s.StringVar(&user.FullName, "full-name", "", "`NAME` for people")
				}}),
			e.verb(verb{use: "set NAME", short: "Change a user's roles, groups or password, or disable it", args: []string{"NAME"}, method: http.MethodPatch,
				path: at("users", "$"), body: func(args []string) (any, error) {
					in := map[string]any{}
					if set.Changed("role") {
						in["roles"] = notNil(edit.roles)
					}
					if set.Changed("group") {
						in["groups"] = notNil(edit.groups)
					}
					if set.Changed("full-name") {
						in["full_name"] = edit.fullName
					}
					if edit.disable || edit.enable {
						in["disabled"] = edit.disable
					}
					if edit.resetTOTP {
						in["reset_totp"] = true
					}
					if edit.password {
						p, err := e.secretLine("New password of " + args[0])
						if err != nil {
							return nil, err
						}
						in["password"] = p
					}
					if len(in) == 0 {
						return nil, errors.New("nothing to change is named")
					}
					return in, nil
				}, flags: func(s *pflag.FlagSet) {
					set = s
					roles(s, &edit.roles)
					s.StringSliceVar(&edit.groups, "group", nil, "`GROUP` that it is in; repeatable")
					s.StringVar(&edit.fullName, "full-name", "", "`NAME` for people")
					s.BoolVar(&edit.password, "password", false, "set a new password, asked for or from standard input")
					s.BoolVar(&edit.disable, "disable", false, "let it sign in no more; its tokens and sessions end")
					s.BoolVar(&edit.enable, "enable", false, "let it sign in again")
					s.BoolVar(&edit.resetTOTP, "reset-totp", false, "take its second factor away")
				}}),
			e.verb(verb{use: "password", short: "Change one's own password (with --at and one's own token)", method: http.MethodPost, path: at("self", "password"),
				body: func([]string) (any, error) {
					old, err := e.secretLine("Old password")
					if err != nil {
						return nil, err
					}
					p, err := e.secretLine("New password")
					return v1.PasswordChange{Old: old, New: p}, err
				}, done: "password changed"}),
			e.verb(verb{use: "delete NAME --confirm NAME", short: "Delete a user with its tokens and sessions", args: []string{"NAME"}, method: http.MethodDelete,
				path: at("users", "$"), confirm: firstArg})),
		group("group", "Groups of users",
			e.listing(listing{use: "list", short: "List the groups", path: fixed("groups"), columns: []string{"name", "roles", "members"}}),
			e.verb(verb{use: "show NAME", short: "Show one group", args: []string{"NAME"}, method: http.MethodGet, path: at("groups", "$")}),
			e.verb(verb{use: "create NAME --role ROLE", short: "Make a group; its members have its roles", args: []string{"NAME"}, method: http.MethodPost,
				path: at("groups"), body: func(args []string) (any, error) { return v1.GroupCreate{Name: args[0], Roles: groupRoles}, nil },
				flags: func(s *pflag.FlagSet) { roles(s, &groupRoles) }}),
			e.verb(verb{use: "set NAME --role ROLE", short: "Change a group's roles", args: []string{"NAME"}, method: http.MethodPatch, path: at("groups", "$"),
				body:  func([]string) (any, error) { return v1.GroupPatch{Roles: notNil(groupRoles)}, nil },
				flags: func(s *pflag.FlagSet) { roles(s, &groupRoles) }}),
			e.verb(verb{use: "delete NAME --confirm NAME", short: "Delete a group without members", args: []string{"NAME"}, method: http.MethodDelete,
				path: at("groups", "$"), confirm: firstArg})),
		group("role", "Roles", e.listing(listing{use: "list", short: "List the roles and what they may do", path: fixed("roles"), columns: []string{"name", "description"}})),
		group("client", "API clients, which sign in by OAuth2 client credentials",
			e.listing(listing{use: "list", short: "List the API clients", path: fixed("clients"), columns: []string{"name", "roles", "vpools", "networks", "created:time"}}),
			e.verb(verb{use: "show NAME", short: "Show one API client", args: []string{"NAME"}, method: http.MethodGet, path: at("clients", "$")}),
			e.verb(verb{use: "create NAME --role ROLE", short: "Make an API client; its secret is shown this once", args: []string{"NAME"}, method: http.MethodPost,
				path: at("clients"), body: func(args []string) (any, error) { apiClient.Name = args[0]; return apiClient, nil },
				flags: func(s *pflag.FlagSet) {
					roles(s, &apiClient.Roles)
					s.StringSliceVar(&apiClient.VPools, "vpool", nil, "`VPOOL` that it may see; repeatable (default: all)")
					s.StringSliceVar(&apiClient.Networks, "network", nil, "`NETWORK` it may come from, as 10.0.0.0/8; repeatable (default: all)")
				}}),
			e.verb(verb{use: "delete NAME --confirm NAME", short: "Delete an API client with its tokens", args: []string{"NAME"}, method: http.MethodDelete,
				path: at("clients", "$"), confirm: firstArg})),
		group("token", "API tokens",
			e.listing(listing{use: "list", short: "List the tokens", path: fixed("tokens"), columns: []string{"name", "owner", "kind", "roles", "vpools", "expires:time"}}),
			e.verb(verb{use: "show NAME", short: "Show one token, without its secret", args: []string{"NAME"}, method: http.MethodGet, path: at("tokens", "$")}),
			e.verb(verb{use: "create NAME", short: "Make an API token; it is shown this once", args: []string{"NAME"}, method: http.MethodPost, path: at("tokens"),
				body: func(args []string) (any, error) {
					token.Name, token.ExpiresIn = args[0], int64(lasts/time.Second)
					return token, nil
				}, flags: func(s *pflag.FlagSet) {
					roles(s, &token.Roles)
					s.StringSliceVar(&token.VPools, "vpool", nil, "`VPOOL` that it may see; repeatable (default: all)")
					s.StringSliceVar(&token.Networks, "network", nil, "`NETWORK` it may be used from; repeatable (default: all)")
					s.DurationVar(&lasts, "lasts", 90*24*time.Hour, "how long it is valid")
				}}),
			e.verb(verb{use: "delete NAME", short: "Revoke a token", args: []string{"NAME"}, method: http.MethodDelete, path: at("tokens", "$")})),
		group("oidc", "Sign-in by OpenID Connect",
			e.verb(verb{use: "show", short: "Show the provider", method: http.MethodGet, path: at("oidc")}),
			e.oidcSet(),
			e.verb(verb{use: "unset", short: "Take the provider away", method: http.MethodDelete, path: at("oidc")})),
		group("audit", "Who did what",
			e.listing(listing{use: "list", short: "List what was done or refused, newest first", path: fixed("audit"), columns: []string{"seq", "time:time", "who", "via", "from",
				"action", "object", "result"}}),
			e.verb(verb{use: "verify", short: "Check the hash chain of the audit log", method: http.MethodGet, path: at("audit", "verification")}),
			e.auditExport()),
		e.verb(verb{use: "whoami", short: "Say who the caller is and what it may do", method: http.MethodGet, path: at("self")}),
		e.loginCommand(), e.setupCodeCommand(),
	}
}

// snapshotPath takes VPOOL/NAME@SNAPSHOT apart.
func snapshotPath(more ...string) func([]string) []string {
	return func(args []string) []string {
		disk, snapshot, _ := strings.Cut(args[0], "@")
		return append([]string{"vdisks", disk, "snapshots", snapshot}, more...)
	}
}

// diskPath is a path below the vDisk that is the first argument, of which a snapshot may follow.
func diskPath(more ...string) func([]string) []string {
	return func(args []string) []string {
		disk, _, _ := strings.Cut(args[0], "@")
		return append([]string{"vdisks", disk}, more...)
	}
}

func snapshotColumns() []string {
	return []string{"name", "created:time", "size:bytes", "consistent", "automatic", "sticky", "backed", "clones"}
}

// snapshotCommands are snapshots and templates.
func (e *env) snapshotCommands() []*cobra.Command {
	var snap v1.SnapshotCreate
	var together v1.SnapshotGroup
	var unkeep, force bool
	spec := func(s *pflag.FlagSet, consistent, sticky *bool, labels *map[string]string) {
		s.BoolVar(consistent, "consistent", false, "the guest's file systems are quiet")
		s.BoolVar(sticky, "keep", false, "retention leaves it alone")
		s.StringToStringVar(labels, "label", nil, "`KEY=VALUE`; repeatable")
	}
	forced := func() map[string]string {
		if force {
			return map[string]string{"force": "true"}
		}
		return nil
	}
	return []*cobra.Command{
		group("snapshot", "Snapshots: points in time of vDisks",
			e.listing(listing{use: "list VPOOL/NAME", short: "List the snapshots of a vDisk", args: []string{"VPOOL/NAME"},
				path: diskPath("snapshots"), columns: snapshotColumns(), complete: e.completeVDisks}),
			e.verb(verb{use: "create VPOOL/NAME [--name NAME]", short: "Take a snapshot", args: []string{"VPOOL/NAME"}, method: http.MethodPost, path: diskPath("snapshots"),
				body: func([]string) (any, error) { return snap, nil }, complete: e.completeVDisks, flags: func(s *pflag.FlagSet) {
					s.StringVar(&snap.Name, "name", "", "`NAME` (default: the time)")
					spec(s, &snap.Consistent, &snap.Sticky, &snap.Labels)
				}}),
			e.verb(verb{use: "group --vdisk VPOOL/NAME …", short: "Take a snapshot of several vDisks at one point in time", method: http.MethodPost, path: at("snapshots"),
				body: func([]string) (any, error) { return together, nil }, flags: func(s *pflag.FlagSet) {
					s.StringSliceVar(&together.VDisks, "vdisk", nil, "`VPOOL/NAME`; repeatable")
					s.StringVar(&together.Name, "name", "", "`NAME` (default: the time)")
					spec(s, &together.Consistent, &together.Sticky, &together.Labels)
				}, table: func(w io.Writer, raw json.RawMessage) error {
					var page struct {
						Items []json.RawMessage `json:"items"`
					}
					if err := json.Unmarshal(raw, &page); err != nil {
						return err
					}
					return printRows(w, page.Items, append([]string{"vdisk"}, snapshotColumns()...))
				}}),
			e.verb(verb{use: "show VPOOL/NAME@SNAPSHOT", short: "Show one snapshot and the space it takes", args: []string{"VPOOL/NAME@SNAPSHOT"}, method: http.MethodGet,
				path: snapshotPath()}),
			e.verb(verb{use: "keep VPOOL/NAME@SNAPSHOT", short: "Have retention leave a snapshot alone, or with --off not any more", args: []string{"VPOOL/NAME@SNAPSHOT"},
				method: http.MethodPatch, path: snapshotPath(), body: func([]string) (any, error) { return map[string]bool{"sticky": !unkeep}, nil },
				flags: func(s *pflag.FlagSet) { s.BoolVar(&unkeep, "off", false, "take the mark off") }}),
			e.verb(verb{use: "rename VPOOL/NAME@SNAPSHOT NEWNAME", short: "Rename a snapshot", args: []string{"VPOOL/NAME@SNAPSHOT", "NEWNAME"}, method: http.MethodPatch,
				path: snapshotPath(), body: named("name", 1)}),
			e.verb(verb{use: "delete VPOOL/NAME@SNAPSHOT --confirm VPOOL/NAME@SNAPSHOT", short: "Delete a snapshot", args: []string{"VPOOL/NAME@SNAPSHOT"},
				method: http.MethodDelete, path: snapshotPath(), confirm: firstArg, query: forced,
				flags: func(s *pflag.FlagSet) { s.BoolVar(&force, "force", false, "also if it is kept") }})),
		group("template", "Templates: what vDisks are made from",
			e.listing(listing{use: "list", short: "List the templates", path: fixed("templates"), columns: []string{"name", "size:bytes", "used:bytes", "created:time"}}),
			e.templateState("set", "Make a vDisk a template, which takes no writes", true),
			e.templateState("unset", "Make a template a vDisk like any other again", false),
			e.templateCopies()),
	}
}

func (e *env) templateState(use, short string, on bool) *cobra.Command {
	var force bool
	return e.verb(verb{use: use + " VPOOL/NAME", short: short, args: []string{"VPOOL/NAME"}, method: http.MethodPut, path: diskPath("template"), complete: e.completeVDisks,
		body:  func([]string) (any, error) { return v1.TemplateState{Template: on, Force: force}, nil },
		flags: func(s *pflag.FlagSet) { s.BoolVar(&force, "force", false, "also while clients have it open") }})
}

func (e *env) templateCopies() *cobra.Command {
	var names []string
	var count int
	return e.verb(verb{use: "create-vdisks VPOOL/TEMPLATE VPOOL/NAME [--count N]", short: "Make vDisks from a template", args: []string{"VPOOL/TEMPLATE", "VPOOL/NAME"},
		long:   "Make vDisks from a template, at once and without copying. With --count N they are called VPOOL/NAME-1 to VPOOL/NAME-N.",
		method: http.MethodPost, path: diskPath("copies"), task: true, complete: e.completeVDisks,
		body: func(args []string) (any, error) {
			names = nil
			if count == 0 {
				names = []string{args[1]}
			}
			for i := 1; i <= count; i++ {
				names = append(names, fmt.Sprintf("%s-%d", args[1], i))
			}
			return v1.TemplateCopies{Names: names}, nil
		}, flags: func(s *pflag.FlagSet) { s.IntVar(&count, "count", 0, "make `N` of them") }})
}

// vdiskVerbs are those of vdisk that came with snapshots.
func (e *env) vdiskVerbs() []*cobra.Command {
	var force bool
	var clone v1.Clone
	var wait v1.WaitLevel
	var restore v1.TrashRestore
	return []*cobra.Command{
		e.verb(verb{use: "clone VPOOL/NAME[@SNAPSHOT] VPOOL/NEWNAME", short: "Make a vDisk that begins as another one, without copying", args: []string{"VPOOL/NAME[@SNAPSHOT]", "VPOOL/NEWNAME"},
			method: http.MethodPost, path: diskPath("clones"), complete: e.completeVDisks, body: func(args []string) (any, error) {
				_, clone.Snapshot, _ = strings.Cut(args[0], "@")
				clone.Name = args[1]
				return clone, nil
			}}),
		e.verb(verb{use: "rollback VPOOL/NAME@SNAPSHOT --confirm VPOOL/NAME", short: "Make a vDisk what it was at a snapshot", args: []string{"VPOOL/NAME@SNAPSHOT"},
			long:   "Make a vDisk what it was at a snapshot. What it was until now stays as an automatic snapshot, which is shown.",
			method: http.MethodPost, path: diskPath("rollback"), body: func(args []string) (any, error) {
				_, snapshot, ok := strings.Cut(args[0], "@")
				if !ok {
					return nil, errors.New("write VPOOL/NAME@SNAPSHOT")
				}
				return v1.Rollback{Snapshot: snapshot, Force: force}, nil
			}, confirm: func(args []string) string { disk, _, _ := strings.Cut(args[0], "@"); return disk },
			flags: func(s *pflag.FlagSet) { s.BoolVar(&force, "force", false, "also while clients have it open") }}),
		e.verb(verb{use: "flatten VPOOL/NAME", short: "Give a clone data of its own, until it needs its parent no more", args: []string{"VPOOL/NAME"},
			method: http.MethodPost, path: diskPath("flatten"), task: true, complete: e.completeVDisks}),
		e.verb(verb{use: "promote VPOOL/NAME", short: "Give a clone the snapshots that it shares with its parent, and make the parent a clone of it", args: []string{"VPOOL/NAME"},
			long: "Give a clone the snapshots of its parent up to the one that it was made from, and make the parent a clone of it,\n" +
				"so that the parent can be deleted. Nothing is copied.",
			method: http.MethodPost, path: diskPath("promote"), complete: e.completeVDisks}),
		e.rewind(),
		e.verb(verb{use: "rewind-window VPOOL/NAME", short: "Say how far back a vDisk can be had as it was", args: []string{"VPOOL/NAME"},
			method: http.MethodGet, path: diskPath("rewind"), complete: e.completeVDisks}),
		e.verb(verb{use: "ledger VPOOL/NAME", short: "Say how far what was written has come", args: []string{"VPOOL/NAME"}, method: http.MethodGet, path: diskPath("ledger"),
			complete: e.completeVDisks}),
		e.verb(verb{use: "wait VPOOL/NAME --level backed", short: "Wait until everything written until now is on the backend", args: []string{"VPOOL/NAME"},
			method: http.MethodPost, path: diskPath("wait"), body: func([]string) (any, error) { return wait, nil }, complete: e.completeVDisks, flags: func(s *pflag.FlagSet) {
				s.StringVar(&wait.Level, "level", "backed", "logged or backed")
				s.IntVar(&wait.Seconds, "seconds", 60, "at most this long")
			}}),
		group("trash", "Deleted vDisks that can be had back",
			e.listing(listing{use: "list", short: "List the deleted vDisks", path: fixed("trash"), columns: []string{"name", "id", "size:bytes", "removed:time", "until:time"}}),
			e.verb(verb{use: "restore ID|VPOOL/NAME [--as VPOOL/NAME]", short: "Bring a deleted vDisk back", args: []string{"ID|VPOOL/NAME"}, method: http.MethodPost,
				path: at("trash", "$", "restore"), body: func([]string) (any, error) { return restore, nil },
				flags: func(s *pflag.FlagSet) { s.StringVar(&restore.Name, "as", "", "under this `NAME`") }}),
			e.verb(verb{use: "purge VPOOL/NAME --confirm VPOOL/NAME", short: "Make a deletion final", args: []string{"VPOOL/NAME"}, method: http.MethodDelete,
				path: at("trash", "$"), confirm: firstArg})),
	}
}

func (e *env) rewind() *cobra.Command {
	var in v1.Rewind
	var to string
	return e.verb(verb{use: "rewind VPOOL/NAME --to TIME [--as VPOOL/NEWNAME]", short: "Make a vDisk of what another one was at any second",
		args: []string{"VPOOL/NAME"},
		long: `Make a vDisk of what another one was when a second began, without copying: any second of the rewind window, which the policy of
the vDisk or its vPool sets (rewind_seconds). TIME is 2006-01-02T15:04:05Z, 2006-01-02 15:04:05 in local time, or how long ago: 90s, 2h30m.
Without --as only a snapshot is made, to which the vDisk can be rolled back.`,
		method: http.MethodPost, path: diskPath("rewind"), task: true, complete: e.completeVDisks,
		body: func([]string) (any, error) {
			at, err := parseMoment(to, time.Now())
			in.At = at
			return in, err
		},
		flags: func(s *pflag.FlagSet) {
			s.StringVar(&to, "to", "", "the `TIME`")
			s.StringVar(&in.Name, "as", "", "make this vDisk, `VPOOL/NEWNAME`")
			s.StringVar(&in.Snapshot, "snapshot", "", "call the snapshot `NAME`")
		}})
}

// parseMoment reads a time, or how long ago it was.
func parseMoment(s string, now time.Time) (time.Time, error) {
	if ago, err := time.ParseDuration(s); err == nil && ago >= 0 {
		return now.Add(-ago).UTC(), nil
	}
	if at, err := time.Parse(time.RFC3339, s); err == nil {
		return at.UTC(), nil
	}
	if at, err := time.ParseInLocation(time.DateTime, s, time.Local); err == nil {
		return at.UTC(), nil
	}
	return time.Time{}, fmt.Errorf("--to %q: write 2006-01-02T15:04:05Z, 2006-01-02 15:04:05, or how long ago, such as 90s", s)
}

// automationCommands are tasks, events, schedules, policies, settings and where events are sent.
func (e *env) automationCommands() []*cobra.Command {
	var scope, cron, zone string
	var disable bool
	var sink v1.SinkSet
	var secretFile, logo string
	var branding v1.BrandingSet
	inScope := func() map[string]string { return map[string]string{"scope": scope} }
	scoped := func(s *pflag.FlagSet) {
		s.StringVar(&scope, "scope", "cluster", "`SCOPE`: cluster, vpool:NAME or vdisk:VPOOL/NAME")
	}
	sinkFlags := func(s *pflag.FlagSet) {
		s.StringVar(&sink.Kind, "kind", "webhook", "webhook or amqp")
		s.StringVar(&sink.URL, "url", "", "`URL` without user and password")
		s.StringVar(&sink.Exchange, "exchange", "", "AMQP `EXCHANGE`")
		s.StringSliceVar(&sink.Topics, "topic", nil, "only events of this `TOPIC`; repeatable")
		s.StringSliceVar(&sink.Types, "type", nil, "only events of this `TYPE`; repeatable")
		s.BoolVar(&sink.Local, "local", false, "it may be an address of this host or its link")
		s.BoolVar(&sink.Disabled, "disabled", false, "send nothing for now")
		s.StringVar(&secretFile, "secret-file", "", "`FILE` with the signing key, or USER:PASSWORD for AMQP")
	}
	sinkBody := func(args []string) (any, error) {
		sink.Name = args[0]
		if secretFile != "" {
			var err error
			if sink.Secret, err = readSecret(secretFile); err != nil {
				return nil, err
			}
		}
		return sink, nil
	}
	brandingFlags := func(s *pflag.FlagSet) {
		s.StringVar(&branding.Product, "product", "", "`NAME` of the product")
		s.StringVar(&branding.Colour, "colour", "", "#rrggbb")
		s.StringVar(&logo, "logo", "", "PNG `FILE`")
		s.BoolVar(&branding.Default, "default", false, "show this one")
	}
	brandingBody := func(args []string) (any, error) {
		branding.Name = args[0]
		if logo != "" {
			b, err := readShort(logo)
			if err != nil {
				return nil, err
			}
			branding.Logo = b
		}
		return branding, nil
	}
	scheduleBody := func([]string) (any, error) { return v1.ScheduleSpec{Cron: cron, Zone: zone, Disabled: disable}, nil }
	return []*cobra.Command{
		group("task", "Long operations",
			e.listing(listing{use: "list", short: "List the tasks, newest first", path: fixed("tasks"), columns: []string{"id", "title", "object", "state", "by", "node", "created:time"}}),
			e.verb(verb{use: "show ID", short: "Show one task", args: []string{"ID"}, method: http.MethodGet, path: at("tasks", "$"), table: printTask}),
			e.verb(verb{use: "watch ID", short: "Wait until a task has ended", args: []string{"ID"}, method: http.MethodGet, path: at("tasks", "$"), task: true}),
			e.verb(verb{use: "cancel ID", short: "Have a task stop at its next step", args: []string{"ID"}, method: http.MethodDelete, path: at("tasks", "$"), table: printTask}),
			e.verb(verb{use: "retry ID", short: "Start a failed or cancelled task again", args: []string{"ID"}, method: http.MethodPost, path: at("tasks", "$", "retry"), task: true})),
		group("event", "What happened",
			e.listing(listing{use: "list", short: "List the events that are kept, newest first", path: fixed("events"), columns: []string{"seq", "at:time", "type", "topic", "key", "data"}}),
			e.eventFollow()),
		group("sink", "Where events are sent: webhooks and AMQP exchanges",
			e.listing(listing{use: "list", short: "List the sinks, and how sending goes", path: fixed("sinks"), columns: []string{"name", "kind", "url", "enabled", "sent", "failing:time", "error"}}),
			e.verb(verb{use: "create NAME --url URL", short: "Send events somewhere; a new webhook's key is shown this once", args: []string{"NAME"}, method: http.MethodPost,
				path: at("sinks"), body: sinkBody, flags: sinkFlags}),
			e.verb(verb{use: "set NAME --url URL", short: "Replace a sink", args: []string{"NAME"}, method: http.MethodPut, path: at("sinks", "$"), body: sinkBody, flags: sinkFlags}),
			e.verb(verb{use: "delete NAME --confirm NAME", short: "Delete a sink", args: []string{"NAME"}, method: http.MethodDelete, path: at("sinks", "$"), confirm: firstArg})),
		group("schedule", "Recurring work",
			e.listing(listing{use: "list", short: "List the schedules", path: fixed("schedules"), columns: []string{"name", "scope", "cron", "zone", "enabled", "inherited", "last:time", "next:time"}}),
			e.verb(verb{use: "set NAME [--scope SCOPE] [--cron CRON]", short: "Override or disable a schedule on a scope", args: []string{"NAME"}, method: http.MethodPut,
				path: at("schedules", "$"), query: inScope, body: scheduleBody, done: "schedule set", flags: func(s *pflag.FlagSet) {
					scoped(s)
					s.StringVar(&cron, "cron", "", "`CRON`: minute hour day month weekday (default: its own)")
					s.StringVar(&zone, "zone", "", "IANA time `ZONE`")
					s.BoolVar(&disable, "disable", false, "do not run it on this scope")
				}}),
			e.verb(verb{use: "inherit NAME [--scope SCOPE]", short: "Take away what a scope sets", args: []string{"NAME"}, method: http.MethodDelete, path: at("schedules", "$"),
				query: inScope, flags: scoped}),
			e.verb(verb{use: "run NAME [--scope SCOPE]", short: "Start the task of a schedule now", args: []string{"NAME"}, method: http.MethodPost,
				path: at("schedules", "$", "run"), query: inScope, flags: scoped, task: true})),
		group("policy", "What holds for a vDisk, its vPool, the cluster; the nearest wins",
			e.listing(listing{use: "list", short: "List what scopes set", path: fixed("policies"), columns: []string{"scope", "set", "modified:time"}}),
			e.verb(verb{use: "show SCOPE", short: "Show what holds on a scope, and where each value was set", args: []string{"SCOPE"}, method: http.MethodGet, path: at("policies", "$"),
				table: printPolicy}),
			e.policySet(),
			e.verb(verb{use: "inherit SCOPE", short: "Take away what a scope sets", args: []string{"SCOPE"}, method: http.MethodDelete, path: at("policies", "$")})),
		group("config", "Settings of the cluster", append(e.configVersions(),
			e.listing(listing{use: "list", short: "List the settings", path: fixed("config"), columns: []string{"key", "value", "version", "by", "at:time"}}),
			e.verb(verb{use: "get KEY", short: "Show one setting and its former values", args: []string{"KEY"}, method: http.MethodGet, path: at("config", "$")}),
			e.verb(verb{use: "set KEY VALUE", short: "Set a setting", args: []string{"KEY", "VALUE"}, method: http.MethodPut, path: at("config", "$"), body: named("value", 1)}),
			e.verb(verb{use: "unset KEY", short: "Take a setting away", args: []string{"KEY"}, method: http.MethodDelete, path: at("config", "$")}))...),
		group("domain", "Domains of failure",
			e.listing(listing{use: "list", short: "List the domains", path: fixed("domains"), columns: []string{"name", "id", "created:time"}}),
			e.verb(verb{use: "create NAME", short: "Make a domain", args: []string{"NAME"}, method: http.MethodPost, path: at("domains"), body: named("name", 0)}),
			e.verb(verb{use: "rename NAME NEWNAME", short: "Rename a domain", args: []string{"NAME", "NEWNAME"}, method: http.MethodPatch, path: at("domains", "$"), body: named("name", 1)}),
			e.verb(verb{use: "delete NAME --confirm NAME", short: "Delete a domain that nothing is in", args: []string{"NAME"}, method: http.MethodDelete, path: at("domains", "$"), confirm: firstArg})),
		group("branding", "How the console looks",
			e.listing(listing{use: "list", short: "List the brandings", path: fixed("brandings"), columns: []string{"name", "product", "colour", "default"}}),
			e.verb(verb{use: "create NAME --product NAME", short: "Make a branding", args: []string{"NAME"}, method: http.MethodPost, path: at("brandings"), body: brandingBody, flags: brandingFlags}),
			e.verb(verb{use: "set NAME --product NAME", short: "Replace a branding", args: []string{"NAME"}, method: http.MethodPut, path: at("brandings", "$"), body: brandingBody, flags: brandingFlags}),
			e.verb(verb{use: "delete NAME --confirm NAME", short: "Delete a branding", args: []string{"NAME"}, method: http.MethodDelete, path: at("brandings", "$"), confirm: firstArg})),
		e.apiCommand(), e.manCommand(), e.supportCommand(),
	}
}

func (e *env) policySet() *cobra.Command {
	var file string
	return e.verb(verb{use: "set SCOPE --file FILE", short: "Replace what a scope sets by a JSON file", args: []string{"SCOPE"}, method: http.MethodPut, path: at("policies", "$"),
		long: `Replace what a scope sets by a JSON file, or by standard input with "-". What it leaves out is inherited:

  {"retention":{"all_days":2,"buckets":[{"days":1,"count":7},{"days":7,"count":3}]},"iops_max":5000}`,
		body: func([]string) (any, error) {
			var b []byte
			var err error
			if file == "-" {
				b, err = io.ReadAll(io.LimitReader(e.std.In, s3FileBytesMax))
			} else {
				b, err = readShort(file)
			}
			if err != nil {
				return nil, err
			}
			if !json.Valid(b) {
				return nil, fmt.Errorf("%s is no JSON", file)
			}
			return json.RawMessage(b), nil
		}, flags: func(s *pflag.FlagSet) { s.StringVar(&file, "file", "-", "`FILE` with the policy") }, table: printPolicy})
}

// printPolicy prints each value that holds with where it was set.
func printPolicy(w io.Writer, raw json.RawMessage) error {
	var p struct {
		Effective map[string]struct {
			Value  json.RawMessage `json:"value"`
			Source string          `json:"source"`
		} `json:"effective"`
	}
	if err := json.Unmarshal(raw, &p); err != nil {
		return err
	}
	var rows [][]string
	names := map[string]string{}
	for n := range p.Effective {
		names[n] = ""
	}
	for _, n := range sortedKeys(names) {
		rows = append(rows, []string{n, string(p.Effective[n].Value), p.Effective[n].Source})
	}
	return printTable(w, []string{"Property", "Value", "Source"}, rows)
}

// secretLine asks for a secret on a terminal, or takes a line of standard input: never an argument, which others can see.
func (e *env) secretLine(prompt string) (string, error) {
	if f, ok := e.std.In.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		fmt.Fprintf(e.std.Err, "%s: ", prompt)
		b, err := term.ReadPassword(int(f.Fd()))
		fmt.Fprintln(e.std.Err)
		if err != nil {
			return "", fmt.Errorf("read %s: %w", strings.ToLower(prompt), err)
		}
		return string(b), nil
	}
	if e.lines == nil {
		e.lines = bufio.NewReader(io.LimitReader(e.std.In, 1<<16))
	}
	line, err := e.lines.ReadString('\n')
	if err != nil && (line == "" || !errors.Is(err, io.EOF)) {
		return "", fmt.Errorf("%s: standard input has no line for it", strings.ToLower(prompt))
	}
	return strings.TrimRight(line, "\r\n"), nil
}

func (e *env) oidcSet() *cobra.Command {
	var in v1.OIDC
	var secretFile, caFile string
	var groups map[string]string
	return e.verb(verb{use: "set --issuer URL --client-id ID --redirect-url URL --group NAME=ROLE", short: "Set the provider, after it has answered", method: http.MethodPut,
		path: at("oidc"), done: "provider set", body: func([]string) (any, error) {
			in.Groups = make(map[string][]string, len(groups))
			for g, roles := range groups {
				in.Groups[g] = strings.Split(roles, "+")
			}
			if secretFile != "" {
				var err error
				if in.ClientSecret, err = readSecret(secretFile); err != nil {
					return nil, err
				}
			}
			if caFile != "" {
				b, err := readShort(caFile)
				if err != nil {
					return nil, err
				}
				in.CA = string(b)
			}
			return in, nil
		}, flags: func(s *pflag.FlagSet) {
			s.StringVar(&in.Issuer, "issuer", "", "`URL` of the provider")
			s.StringVar(&in.ClientID, "client-id", "", "`ID` of this cluster there")
			s.StringVar(&secretFile, "secret-file", "", "`FILE` with the client's secret")
			s.StringVar(&in.RedirectURL, "redirect-url", "", "`URL`: https://HOST/api/internal/oidc/callback")
			s.StringVar(&caFile, "ca-file", "", "`FILE` with the only authorities to trust, PEM")
			s.StringVar(&in.GroupClaim, "group-claim", "", "`CLAIM` with the groups (default: groups)")
			s.StringToStringVar(&groups, "group", nil, "`NAME=ROLE[+ROLE]` that a group gives; repeatable")
			s.BoolVar(&in.Local, "local", false, "the provider may be on this host or its link")
		}})
}

func (e *env) auditExport() *cobra.Command {
	return &cobra.Command{
		Use: "export", Short: "Write the audit log as JSON lines, to be kept elsewhere", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return e.call("audit export", "", func(s *session) error {
				raw, err := s.Do(s.ctx(cmd), http.MethodGet, v1.Prefix+"/audit/export", nil, nil)
				if err != nil {
					return err
				}
				_, err = e.std.Out.Write(raw.Body)
				return err
			})
		},
	}
}

func (e *env) loginCommand() *cobra.Command {
	var code string
	c := &cobra.Command{
		Use: "login NAME --at URL --token-file FILE", Short: "Sign in elsewhere: a token of an hour into the token file", Args: exactly("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if e.at == "" || e.tokenFile == "" {
				return usage("login needs --at URL and --token-file FILE, which it writes")
			}
			password, err := e.secretLine("Password of " + args[0])
			if err != nil {
				return err
			}
			c, err := client.New(client.Config{URL: e.at, CAFile: e.ca})
			if err != nil {
				return &Failure{Exit: ExitUsage, Why: err.Error(), Remedy: "see varve --help", Err: err}
			}
			defer c.Close()
			token, err := c.Login(cmd.Context(), args[0], password, code)
			if err != nil {
				return e.failure("login", args[0], err)
			}
			if err := os.WriteFile(e.tokenFile, []byte(token+"\n"), 0o600); err != nil {
				return e.failure("write token", e.tokenFile, err)
			}
			return e.failure("write token", e.tokenFile, os.Chmod(e.tokenFile, 0o600))
		},
	}
	c.Flags().StringVar(&code, "code", "", "`CODE` of the second factor")
	return c
}

func (e *env) setupCodeCommand() *cobra.Command {
	return &cobra.Command{
		Use: "setup-code", Short: "Make a new code for the first administrator (on the appliance)", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return e.call("setup-code", "", func(s *session) error {
				code, err := s.SetupCode(s.ctx(cmd))
				if err != nil {
					return err
				}
				return e.show(map[string]string{"code": code}, func(w io.Writer) error { _, err := fmt.Fprintln(w, code); return err })
			})
		},
	}
}

// eventFollow prints events as they come, and goes on after a lost connection where it was.
func (e *env) eventFollow() *cobra.Command {
	var since string
	var types, topics []string
	c := &cobra.Command{
		Use: "follow", Short: "Print events as they come, one JSON object a line", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return e.call("event follow", "", func(s *session) error {
				return s.Events(cmd.Context(), client.EventFilter{Since: since, Types: types, Topics: topics}, func(data []byte) error {
					_, err := fmt.Fprintf(e.std.Out, "%s\n", data)
					return err
				})
			})
		},
	}
	c.Flags().StringVar(&since, "since", "", "first those after the event with this `SEQ`; 0 for all that are kept")
	c.Flags().StringSliceVar(&types, "type", nil, "only events of this `TYPE`; repeatable")
	c.Flags().StringSliceVar(&topics, "topic", nil, "only events of this `TOPIC`; repeatable")
	return c
}

// apiCommand is any call, for what has no command of its own yet.
func (e *env) apiCommand() *cobra.Command {
	var in string
	var headers []string
	c := &cobra.Command{
		Use: "api METHOD PATH", Short: "Call the API: varve api GET /vdisks?limit=5", Args: exactly("METHOD", "PATH"),
		RunE: func(cmd *cobra.Command, args []string) error {
			path := args[1]
			if !strings.HasPrefix(path, "/api") {
				path = v1.Prefix + path
			}
			var body []byte
			if in != "" {
				b, err := readShort(in)
				if err != nil {
					return e.failure("read", in, err)
				}
				body = b
			}
			h := http.Header{}
			for _, line := range headers {
				k, v, ok := strings.Cut(line, ":")
				if !ok {
					return usage("--header %q is not NAME: VALUE", line)
				}
				h.Add(strings.TrimSpace(k), strings.TrimSpace(v))
			}
			return e.call("api "+args[0], args[1], func(s *session) error {
				raw, err := s.Do(s.ctx(cmd), strings.ToUpper(args[0]), path, h, body)
				if err != nil {
					return err
				}
				_, err = fmt.Fprintln(e.std.Out, strings.TrimRight(string(raw.Body), "\n"))
				return err
			})
		},
	}
	c.Flags().StringVar(&in, "body", "", "`FILE` with the JSON to send")
	c.Flags().StringArrayVar(&headers, "header", nil, "`NAME: VALUE` to send, such as 'If-Match: *'; repeatable")
	return c
}

func (e *env) manCommand() *cobra.Command {
	return &cobra.Command{
		Use: "man DIR", Short: "Write the manual pages of all commands to a directory", Args: exactly("DIR"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := os.MkdirAll(args[0], 0o755); err != nil {
				return e.failure("man", args[0], err)
			}
			head := &doc.GenManHeader{Title: "VARVE", Section: "1", Source: "Varve " + e.std.Version, Manual: "Varve"}
			if err := doc.GenManTree(cmd.Root(), head, filepath.Clean(args[0])); err != nil {
				return e.failure("man", args[0], err)
			}
			return nil
		},
	}
}
