package cli

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"varve/appliance/server"
	v1 "varve/control/api/customer"
	"varve/control/vpool"
)

// s3Flags say what opens a bucket.
type s3Flags struct {
	credentialsFile, caFile string
	allowUnsafe             bool
}

const (
	accessKeyName = "VARVE_S3_ACCESS_KEY"
	secretKeyName = "VARVE_S3_SECRET_KEY"

	s3FileBytesMax = 64 << 10
	s3Help         = `s3://bucket/prefix?endpoint=https://host:port&region=name. The keys of a bucket come from VARVE_S3_ACCESS_KEY and
VARVE_S3_SECRET_KEY in the environment, or from --credentials-file; they are kept sealed and never shown.`
)

func (f *s3Flags) add(flags *pflag.FlagSet) {
	f.addCredentials(flags)
	flags.StringVar(&f.caFile, "ca-file", "", "`FILE` with the only authorities to trust for a bucket, PEM (default: those of the system)")
	flags.BoolVar(&f.allowUnsafe, "allow-unsafe-backend", false, "take a bucket whose store ignores If-None-Match")
}

func (f *s3Flags) addCredentials(flags *pflag.FlagSet) {
	flags.StringVar(&f.credentialsFile, "credentials-file", "", "`FILE` with access_key = … and secret_key = … of a bucket (default: from the environment)")
}

// keys reads the credentials; empty if none are given.
func (e *env) s3Keys(f s3Flags) (vpool.Keys, error) {
	if f.credentialsFile == "" {
		k := vpool.Keys{Access: e.std.Getenv(accessKeyName), Secret: e.std.Getenv(secretKeyName)}
		if (k.Access == "") != (k.Secret == "") {
			return vpool.Keys{}, usage("only one of %s and %s is set", accessKeyName, secretKeyName)
		}
		return k, nil
	}
	b, err := readShort(f.credentialsFile)
	if err != nil {
		return vpool.Keys{}, usage("--credentials-file: %v", err)
	}
	k, ok := parseKeys(b)
	if !ok {
		return vpool.Keys{}, usage("--credentials-file %s: it has not both access_key = … and secret_key = …", f.credentialsFile)
	}
	return k, nil
}

// parseKeys reads JSON, or lines of name = value as in the environment or in an AWS profile. The last value counts.
func parseKeys(b []byte) (k vpool.Keys, ok bool) {
	if json.Unmarshal(b, &k) == nil {
		return k, k.Access != "" && k.Secret != ""
	}
	k = vpool.Keys{}
	for line := range strings.Lines(string(b)) {
		name, value, found := strings.Cut(strings.TrimPrefix(strings.TrimSpace(line), "export "), "=")
		if !found {
			continue
		}
		value = strings.Trim(strings.TrimSpace(value), `"'`)
		switch strings.ToLower(strings.TrimSpace(name)) {
		case "access_key", "aws_access_key_id", strings.ToLower(accessKeyName):
			k.Access = value
		case "secret_key", "aws_secret_access_key", strings.ToLower(secretKeyName):
			k.Secret = value
		}
	}
	return k, k.Access != "" && k.Secret != ""
}

func readShort(path string) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if info.Size() > s3FileBytesMax {
		return nil, fmt.Errorf("%s has %d bytes, more than %d", path, info.Size(), s3FileBytesMax)
	}
	return os.ReadFile(path)
}

func (f s3Flags) authorities() (string, error) {
	if f.caFile == "" {
		return "", nil
	}
	b, err := readShort(f.caFile)
	if err != nil {
		return "", usage("--ca-file: %v", err)
	}
	if !strings.Contains(string(b), "-----BEGIN CERTIFICATE-----") {
		return "", usage("--ca-file %s: no PEM certificate is in it", f.caFile)
	}
	return string(b), nil
}

// s3Config is the bucket of a server's configuration. url is empty where the flags only say what opens one.
func (e *env) s3Config(url string, f s3Flags) (server.S3, error) {
	k, err := e.s3Keys(f)
	if err != nil {
		return server.S3{}, err
	}
	ca, err := f.authorities()
	return server.S3{URL: url, Keys: k, CA: ca, AllowUnsafe: f.allowUnsafe}, err
}

// fill puts what opens a bucket into a request for a vPool. Other backends take nothing of it.
func (e *env) fillBucket(spec *v1.VPoolCreate, f s3Flags) error {
	if !strings.HasPrefix(spec.Backend, "s3:") {
		return nil
	}
	k, err := e.s3Keys(f)
	if err != nil {
		return err
	}
	spec.Credentials = v1.Credentials{AccessKey: k.Access, SecretKey: k.Secret}
	spec.AllowUnsafe = f.allowUnsafe
	spec.CA, err = f.authorities()
	return err
}

func (e *env) vpoolSetCredentials() *cobra.Command {
	var f s3Flags
	var force bool
	c := &cobra.Command{
		Use: "set-credentials NAME", Short: "Change the keys of a vPool's bucket, without a restart", Args: exactly("NAME"),
		Long: `Change the keys of a vPool's bucket. They are tried first, and used from the next request on; guests notice nothing.

  VARVE_S3_ACCESS_KEY=… VARVE_S3_SECRET_KEY=… varve vpool set-credentials fast
  varve vpool set-credentials fast --credentials-file keys.txt`,
		ValidArgsFunction: e.completeVPools,
		RunE: func(cmd *cobra.Command, args []string) error {
			k, err := e.s3Keys(f)
			if err != nil {
				return err
			}
			return e.call("set credentials of vpool", args[0], func(s *session) error {
				return s.SetVPoolCredentials(s.ctx(cmd), args[0], v1.Credentials{AccessKey: k.Access, SecretKey: k.Secret, Force: force})
			})
		},
	}
	f.addCredentials(c.Flags())
	c.Flags().BoolVar(&force, "force", false, "keep them even if they do not work now")
	return c
}
