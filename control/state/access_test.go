package state

import (
	"fmt"
	"strings"
	"testing"

	"github.com/google/uuid"
)

// A change inside the chain, an entry taken out, and one put in are each found, also by a restore.
func TestAuditChain(t *testing.T) {
	m := newMachine(t)
	for i := range 10 {
		m.must(&AppendAudit{Entries: []AuditEntry{{Who: "user/a", Action: "createVDisk", Object: fmt.Sprint(i), Result: "ok"}, {Who: "user/b", Action: "x"}}})
	}
	first, last, n, head, broken := m.s.View().VerifyAudit()
	if first != 1 || last != 20 || n != 20 || broken != 0 || head != m.s.View().lastAudit().Hash {
		t.Fatal(first, last, n, head, broken)
	}
	if got := m.s.View().Audit(18, 10); len(got) != 2 || got[0].Seq != 19 || got[1].Previous != got[0].Hash {
		t.Fatalf("%+v", got)
	}
	m.fails(ErrInvalid, &AppendAudit{})
	m.fails(ErrInvalid, &AppendAudit{Entries: []AuditEntry{{Action: strings.Repeat("x", 600)}}})
	m.fails(ErrInvalid, &AppendAudit{Entries: []AuditEntry{{Action: "x", Hash: "mine"}}})
	for what, tamper := range map[string]func(*tx, AuditEntry){
		"changed": func(x *tx, e AuditEntry) { e.Result = "denied"; x.put(tAudit, &e) },
		"changed with its hash": func(x *tx, e AuditEntry) {
			e.Result = "denied"
			e.Hash = e.Sum()
			x.put(tAudit, &e)
		},
		"taken out": func(x *tx, e AuditEntry) { x.del(tAudit, &e) },
	} {
		snapshot := m.s.db.Txn(true)
		tamper(&tx{View: View{txn: snapshot}}, m.s.View().Audit(6, 1)[0])
		v := &View{txn: snapshot}
		if _, _, _, _, broken := v.VerifyAudit(); broken != 7 && broken != 8 {
			t.Errorf("%s: broken at %d", what, broken)
		}
		if v.Check() == nil {
			t.Errorf("%s: the checker finds nothing", what)
		}
		snapshot.Abort()
	}
}

// The audit log keeps its last entries, and its chain starts where the ones dropped ended.
func TestAuditIsBounded(t *testing.T) {
	if testing.Short() {
		t.Skip("writes 65,600 entries")
	}
	m := newMachine(t)
	batch := make([]AuditEntry, auditAppendMax)
	for i := range batch {
		batch[i] = AuditEntry{Who: "user/a", Action: "x"}
	}
	for i := range uint64(AuditEntriesMax/auditAppendMax + 1) { // without the machine's own checks, which read everything
		entry, err := Encode(&AppendAudit{Entries: batch}, uuid.New(), 1)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := m.s.Apply(1000+i, entry); err != nil {
			t.Fatal(err)
		}
	}
	first, last, n, _, broken := m.s.View().VerifyAudit()
	if first != auditAppendMax+1 || last != AuditEntriesMax+auditAppendMax || n != AuditEntriesMax || broken != 0 {
		t.Fatal(first, last, n, broken)
	}
}

// Users, groups, sessions and tokens end with what they hang on, and the last administrator stays.
func TestAccess(t *testing.T) {
	m := newMachine(t)
	hash := func(b byte) []byte { return append(make([]byte, 31), b) }
	ada, bob, group := uuid.New(), uuid.New(), uuid.New()
	pw, admin, viewer := "$argon2id$x", []string{RoleAdmin}, []string{RoleViewer}
	m.must(&SetUser{ID: ada, Create: true, First: true, Name: "ada", Source: SourcePassword, Roles: &admin, Password: &pw})
	m.fails(ErrConflict, &SetUser{ID: bob, Create: true, First: true, Name: "bob", Source: SourcePassword})
	m.fails(ErrExist, &SetUser{ID: bob, Create: true, Name: "ada", Source: SourcePassword})
	m.fails(ErrInvalid, &SetUser{ID: bob, Create: true, Name: "Bob", Source: SourcePassword})
	m.fails(ErrInvalid, &SetUser{ID: bob, Create: true, Name: "bob", Source: SourceOIDC})
	m.must(&SetGroup{ID: group, Create: true, Name: "admins", Roles: admin})
	groups := []uuid.UUID{group}
	m.must(&SetUser{ID: bob, Create: true, Name: "bob", Source: SourcePassword, Roles: &viewer, Groups: &groups, Password: &pw})
	m.fails(ErrConflict, &DeleteGroup{ID: group})
	if u, _ := m.s.View().User(bob); fmt.Sprint(m.s.View().RolesOf(u)) != "[admin viewer]" {
		t.Fatal(m.s.View().RolesOf(u))
	}
	m.must(&DeleteUser{ID: ada}) // bob is an administrator by his group
	none := []uuid.UUID{}
	m.fails(ErrConflict, &SetUser{ID: bob, Groups: &none})
	m.fails(ErrConflict, &SetGroup{ID: group, Roles: viewer})
	m.fails(ErrConflict, &DeleteUser{ID: bob})
	yes := true
	m.fails(ErrConflict, &SetUser{ID: bob, Disabled: &yes})

	u, err := m.s.View().User(bob)
	if err != nil {
		t.Fatal(err)
	}
	session := func(b byte, rev uint64) *CreateSession {
		return &CreateSession{ID: uuid.New(), User: bob, UserRev: rev, Hash: hash(b), Lasts: 1000, Idle: 100}
	}
	m.fails(ErrConflict, session(1, u.Rev+1)) // changed while the password was checked
	for i := range SessionsEachMax + 5 {
		m.must(session(byte(i+1), u.Rev))
	}
	if n := len(m.s.View().SessionsOf(bob)); n > SessionsEachMax || n < 1 {
		t.Fatalf("%d sessions", n)
	}
	m.must(&SetToken{Name: "t", ID: uuid.New(), New: true, Hash: hash(200), Owner: bob, Roles: viewer})
	m.fails(ErrExist, &SetToken{Name: "t", ID: uuid.New(), New: true, Hash: hash(201), Owner: bob, Roles: viewer})
	m.fails(ErrNotFound, &SetToken{Name: "t2", ID: uuid.New(), New: true, Hash: hash(202), Owner: uuid.New(), Roles: viewer})
	m.fails(ErrInvalid, &SetToken{Name: "t2", Hash: hash(203), Owner: bob, Roles: []string{"god"}})
	if tok, ok := m.s.View().TokenByHash([32]byte(hash(200))); !ok || tok.Name != "t" {
		t.Fatal(tok, ok)
	}
	m.must(&SetUser{ID: bob, Password: &pw})
	if n := len(m.s.View().SessionsOf(bob)); n != 0 {
		t.Fatalf("%d sessions outlive a new password", n)
	}
	m.must(&SetUser{ID: ada, Create: true, Name: "ada", Source: SourcePassword, Roles: &admin, Password: &pw})
	m.must(&DeleteUser{ID: bob})
	if _, ok := m.s.View().TokenByHash([32]byte(hash(200))); ok {
		t.Fatal("a token outlives its owner")
	}
	m.must(&BeginAnswer{Key: [32]byte{1}})
	m.fails(ErrExist, &BeginAnswer{Key: [32]byte{1}})
	m.must(&EndAnswer{Key: [32]byte{1}, Status: 201, Body: "{}"})
	m.fails(ErrInvalid, &EndAnswer{Key: [32]byte{1}, Status: 201, Body: strings.Repeat("x", AnswerBytesMax+1)})
	m.must(&EndAnswer{Key: [32]byte{1}})
	if _, ok := m.s.View().Answer([32]byte{1}); ok {
		t.Fatal("a key that was given back is kept")
	}
}
