package cli

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"varve/appliance/nbdclient"
	"varve/appliance/server"
	"varve/appliance/transfer"
	"varve/control/api/client"
	v1 "varve/control/api/customer"
	"varve/control/state"
)

// session is a connection to the appliance for one command.
type session struct {
	*client.Client
	e       *env
	cancels []context.CancelFunc
}

// ctx bounds one call.
func (s *session) ctx(cmd *cobra.Command) context.Context {
	ctx, cancel := context.WithTimeout(cmd.Context(), s.e.timeout)
	s.cancels = append(s.cancels, cancel)
	return ctx
}

// call runs f with a session and turns its error into a Failure about what and object.
func (e *env) call(what, object string, f func(*session) error) error {
	s, err := e.session()
	if err != nil {
		return err
	}
	defer func() {
		for _, cancel := range s.cancels {
			cancel()
		}
		s.Close()
	}()
	return e.failure(what, object, f(s))
}

func (e *env) session() (*session, error) {
	if e.at == "" && e.data == "" {
		return nil, usage("no appliance is named: give --data DIR or --at URL")
	}
	cfg := client.Config{Socket: server.APISocket(e.data)}
	if e.at != "" {
		cfg = client.Config{URL: e.at, CAFile: e.ca}
		if e.tokenFile == "" {
			return nil, usage("--at needs --token-file")
		}
		token, err := readSecret(e.tokenFile)
		if err != nil {
			return nil, &Failure{Exit: ExitUsage, What: "read token", Object: e.tokenFile, Why: reason(err),
				Remedy: "copy DATA/admin.token of the appliance and chmod 600 it", Err: err}
		}
		cfg.Token = token
	}
	c, err := client.New(cfg)
	if err != nil {
		return nil, &Failure{Exit: ExitUsage, Why: err.Error(), Remedy: "see varve --help", Err: err}
	}
	return &session{Client: c, e: e}, nil
}

// failure is the one place where errors get their exit code.
func (e *env) failure(what, object string, err error) error {
	if err == nil {
		return nil
	}
	if _, ok := errors.AsType[*silent](err); ok {
		return err
	}
	if f, ok := errors.AsType[*Failure](err); ok {
		return f
	}
	f := &Failure{Exit: ExitFailed, What: what, Object: object, Why: reason(err), Err: err}
	if p, ok := errors.AsType[*v1.Problem](err); ok {
		f.Exit, f.Why, f.Remedy, f.RequestID = exitOf(p.Status), p.Error(), p.Remedy, p.RequestID
		if why, ok := strings.CutPrefix(f.Why, p.Object+": "); ok && p.Object != "" {
			f.Why = why
			if !strings.HasSuffix(strings.TrimSuffix(p.Object, `"`), object) || object == "" { // it is about something else than what was named
				f.Why = p.Object + " " + why
			}
		}
		return f
	}
	if h, ok := errors.AsType[remedied](err); ok {
		f.Remedy = h.Remedy()
	}
	where := "no appliance answers on " + e.data
	remedy := "start it with: varve serve --data " + e.data
	if e.at != "" {
		where, remedy = "no appliance answers at "+e.at, "check the address, and that the appliance runs"
	}
	switch {
	case errors.Is(err, context.Canceled):
		f.Why = "interrupted"
	case errors.Is(err, context.DeadlineExceeded):
		f.Exit, f.Why, f.Remedy = ExitUnavailable, fmt.Sprintf("no answer within %s", e.timeout), "look at varve status, or give a longer --timeout"
	case errors.Is(err, client.ErrUnreachable) && errors.Is(err, fs.ErrPermission):
		f.Exit, f.Why, f.Remedy = ExitNotAllowed, "this user may not open the appliance's socket", "run the command as the appliance's user or as root"
	case errors.Is(err, client.ErrUnreachable):
		f.Exit, f.Remedy = ExitUnavailable, remedy
		f.Why = where
		if e.at != "" {
			f.Why += ": " + reason(err)
		}
		if _, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
			f.Remedy = "give --ca FILE with the appliance's DATA/tls/ca.crt"
		}
	case errors.Is(err, nbdclient.ErrUnknownExport):
		f.Exit = ExitNotFound
		f.Remedy = cmp.Or(f.Remedy, "see the names: varve vdisk list")
	case errors.Is(err, fs.ErrNotExist):
		f.Exit = ExitNotFound
		f.Remedy = cmp.Or(f.Remedy, "check the path")
	case errors.Is(err, fs.ErrExist), errors.Is(err, state.ErrExist), errors.Is(err, state.ErrConflict):
		f.Exit = ExitConflict
	case errors.Is(err, state.ErrNotFound):
		f.Exit = ExitNotFound
	case errors.Is(err, state.ErrInvalid):
		f.Exit = ExitUsage
	case errors.Is(err, fs.ErrPermission):
		f.Exit = ExitNotAllowed
		f.Remedy = cmp.Or(f.Remedy, "run the command as a user who may")
	}
	if s, ok := errors.AsType[*state.Error](err); ok {
		f.Remedy = cmp.Or(f.Remedy, s.Remedy)
	}
	return f
}

func exitOf(status int) int {
	switch status {
	case http.StatusBadRequest, http.StatusRequestEntityTooLarge:
		return ExitUsage
	case http.StatusNotFound:
		return ExitNotFound
	case http.StatusConflict, http.StatusPreconditionFailed:
		return ExitConflict
	case http.StatusUnauthorized, http.StatusForbidden:
		return ExitNotAllowed
	case http.StatusServiceUnavailable, http.StatusBadGateway, http.StatusGatewayTimeout:
		return ExitUnavailable
	}
	return ExitFailed
}

// reason is an error's text without the words that the message around it has already.
func reason(err error) string {
	if p, ok := errors.AsType[*fs.PathError](err); ok && err == error(p) {
		return p.Path + ": " + p.Err.Error()
	}
	if u, ok := errors.AsType[*url.Error](err); ok && errors.Is(err, client.ErrUnreachable) {
		return u.Err.Error()
	}
	return err.Error()
}

// disks is the appliance as an import needs it.
type disks struct {
	s   *session
	cmd *cobra.Command
}

// Create implements transfer.Disks.
func (d disks) Create(ctx context.Context, name string, size int64) error {
	ctx, cancel := context.WithTimeout(ctx, d.s.e.timeout)
	defer cancel()
	_, err := d.s.CreateVDisk(ctx, name, size)
	return err
}

// Delete implements transfer.Disks. The import's own connection may still be counted, so it forces.
func (d disks) Delete(ctx context.Context, name string) error {
	return d.s.DeleteVDisk(ctx, name, true)
}

// Target implements transfer.Disks.
func (d disks) Target(ctx context.Context, name string) (nbdclient.Target, error) {
	t, err := d.s.nbdTarget(ctx)
	t.Export = name
	return t, err
}

// nbdTarget says where the appliance's NBD exports are: at its unix socket, or at the address that it serves NBD on.
func (s *session) nbdTarget(ctx context.Context) (nbdclient.Target, error) {
	if s.e.at == "" {
		return nbdclient.Target{Network: "unix", Address: server.NBDSocket(s.e.data)}, nil
	}
	st, err := s.Status(ctx)
	if err != nil {
		return nbdclient.Target{}, err
	}
	u, err := url.Parse(s.e.at)
	if err != nil {
		return nbdclient.Target{}, err
	}
	for _, v := range st.Services {
		if v.Name != "nbd" {
			continue
		}
		_, port, err := net.SplitHostPort(v.Address)
		if err != nil {
			return nbdclient.Target{}, fmt.Errorf("NBD address of the appliance: %w", err)
		}
		return nbdclient.Target{Network: "tcp", Address: net.JoinHostPort(u.Hostname(), port)}, nil
	}
	return nbdclient.Target{}, &transfer.Error{Err: errors.New("the appliance serves no NBD over the network"),
		Help: "run the command on the appliance with --data DIR, or start it with --nbd ADDR"}
}

const completionTimeout = 2 * time.Second

// complete offers live names; an appliance that does not answer offers none.
func (e *env) complete(cmd *cobra.Command, names func(context.Context, *session) ([]string, error)) ([]string, cobra.ShellCompDirective) {
	s, err := e.session()
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	defer s.Close()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(cmd.Context()), completionTimeout)
	defer cancel()
	list, err := names(ctx, s)
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return list, cobra.ShellCompDirectiveNoFileComp
}

func (e *env) completeVPools(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return e.complete(cmd, func(ctx context.Context, s *session) ([]string, error) {
		pools, err := s.VPools(ctx)
		var names []string
		for _, p := range pools {
			names = append(names, p.Name)
		}
		return names, err
	})
}

func (e *env) completeVDisks(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveDefault
	}
	return e.complete(cmd, func(ctx context.Context, s *session) ([]string, error) {
		list, err := s.VDisks(ctx, "", client.Select{})
		var names []string
		for _, d := range list {
			names = append(names, d.Name)
		}
		return names, err
	})
}

// readSecret reads a token from a file that only its owner may read.
func readSecret(path string) (string, error) {
	info, err := os.Stat(path)
	if err != nil {
		return "", err
	}
	if info.Mode().Perm()&0o077 != 0 {
		return "", fmt.Errorf("others may read it (mode %04o)", info.Mode().Perm())
	}
	const tokenBytesMax = 64 << 10
	if info.Size() > tokenBytesMax {
		return "", fmt.Errorf("%d bytes are too many for a token", info.Size())
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return "", err
	}
	return strings.TrimSpace(string(b)), nil
}
