// Who may do what: users, groups, roles, programs, tokens, the identity provider.
import { Button, Card, CardBody, Content, Form } from '@patternfly/react-core';
import { KeyIcon, RobotIcon, UsersIcon } from '@patternfly/react-icons';
import { useEffect, useState } from 'react';
import type { FormEvent } from 'react';
import { call } from '../api/call';
import type { ItemOf } from '../api/call';
import { useCall, useRefresh } from '../api/query';
import { useMay, useSession } from '../api/session';
import { t } from '../strings';
import { running } from '../strings/running';
import { Destroy, FormDialog, fieldErrors } from '../ui/dialog';
import { CheckField, ChoicesField, FieldErrors, TextAreaField, TextField } from '../ui/fields';
import { ObjectTable } from '../ui/ObjectTable';
import { Page } from '../ui/Page';
import { ProblemAlert } from '../ui/Problem';
import { Secret, lines } from '../ui/Secret';
import { State, When } from '../ui/State';
import { URLTabs } from '../ui/URLTabs';
import { useToast } from '../ui/toast';

type User = ItemOf<'listUsers'>;
type Group = ItemOf<'listGroups'>;
type Role = ItemOf<'listRoles'>;
type Client = ItemOf<'listClients'>;
type Token = ItemOf<'listTokens'>;

/** The roles, to choose from; only some of the caller's own if mine is set. */
function useRoleOptions(mine = false): [string, string, string?][] {
  const roles = useCall('listRoles');
  const { session } = useSession();
  return (roles.data?.items ?? []).filter((r) => !mine || session?.roles.includes(r.name) || session?.roles.includes('admin')).map((r) => [r.name, r.name, r.description]);
}

export function Users() {
  const s = running.users;
  return (
    <Page title={s.title} lead={s.lead} operations={['listUsers', 'createUser', 'getUser', 'patchUser', 'deleteUser', 'listGroups', 'createGroup', 'getGroup', 'patchGroup', 'deleteGroup', 'listRoles']}>
      <URLTabs label={s.title} tabs={[['users', s.tabUsers, () => <UserTable />], ['groups', s.tabGroups, () => <GroupTable />], ['roles', s.tabRoles, () => <RoleTable />]]} />
    </Page>
  );
}

function UserTable() {
  const s = running.users;
  const may = useMay();
  const toast = useToast();
  const refresh = useRefresh();
  const [doing, setDoing] = useState<{ what: 'create' } | { what: 'edit' | 'delete'; user: User }>();
  const create = may('createUser') && <Button variant="secondary" onClick={() => setDoing({ what: 'create' })}>{s.create}</Button>;
  const close = () => setDoing(undefined);
  return (
    <>
      <ObjectTable id="users" label={s.tabUsers} op="listUsers" rowKey={(x: User) => x.id} tools={create} sort="name"
        columns={[
          { key: 'name', title: running.name, cell: (x) => <>{x.name} {x.disabled && <State value="disabled" text={s.disabled} />}</> }, { key: 'full_name', title: s.full, cell: (x) => x.full_name ?? '' },
          { key: 'roles', title: running.roles, cell: (x) => x.roles.join(', ') }, { key: 'groups', title: s.groups, cell: (x) => x.groups.join(', ') }, { key: 'source', title: s.source, cell: (x) => x.source },
          { key: 'totp', title: s.totp, cell: (x) => (x.totp ? running.yes : running.no) }, { key: 'created', title: running.created, hidden: true, cell: (x) => <When at={x.created} /> },
        ]}
        actions={(x) => [
          { title: running.edit, disabled: !may('patchUser'), onClick: () => setDoing({ what: 'edit', user: x }) },
          { title: running.delete, danger: true, separated: true, disabled: !may('deleteUser'), onClick: () => setDoing({ what: 'delete', user: x }) },
        ]}
        empty={{ title: s.empty, body: s.emptyBody, action: create, icon: UsersIcon }} />
      {doing?.what === 'create' && <UserDialog onClose={close} />}
      {doing?.what === 'edit' && <LoadedUser name={doing.user.name} onClose={close} />}
      {doing?.what === 'delete' && (
        <Destroy title={running.deleteTitle(doing.user.name)} verb={t.remove} op="deleteUser" args={{ path: { user: doing.user.name }, rev: doing.user.rev }} onClose={close}
          onDone={() => { toast.done(running.deleted(doing.user.name)); void refresh('listUsers'); }} />
      )}
    </>
  );
}

/** Reads the user anew, so that what is changed is what is there now. */
function LoadedUser({ name, onClose }: { name: string; onClose: () => void }) {
  const query = useCall('getUser', { path: { user: name } });
  return query.data ? <UserDialog user={query.data} onClose={onClose} /> : null;
}

function UserDialog({ user, onClose }: { user?: User; onClose: () => void }) {
  const s = running.users;
  const roles = useRoleOptions();
  const groups = useCall('listGroups');
  const [name, setName] = useState('');
  const [full, setFull] = useState(user?.full_name ?? '');
  const [password, setPassword] = useState('');
  const [chosen, setChosen] = useState(user?.roles ?? ['viewer']);
  const [member, setMember] = useState(user?.groups ?? []);
  const [disabled, setDisabled] = useState(user?.disabled ?? false);
  const [reset, setReset] = useState(false);
  const toast = useToast();
  const refresh = useRefresh();
  return (
    <FormDialog wide title={user ? s.editUser(user.name) : s.create} submit={user ? t.save : t.create} description={user ? s.sessions : undefined} onClose={onClose} disabled={!user && (!name || password.length < 12)}
      onSubmit={async () => {
        if (user) {
          await call('patchUser', { path: { user: user.name }, rev: user.rev, body: { full_name: full, roles: chosen, groups: member, disabled, ...(password ? { password } : {}), ...(reset ? { reset_totp: true } : {}) } });
        } else {
          await call('createUser', { body: { name, password, roles: chosen, groups: member, ...(full ? { full_name: full } : {}) } });
        }
        await refresh('listUsers', 'listGroups', 'getUser');
        toast.done(running.saved(user?.name ?? name));
      }}>
      {!user && <TextField label={s.userName} name="name" value={name} onChange={setName} required autoFocus help={s.nameHelp} />}
      <TextField label={s.full} name="full_name" value={full} onChange={setFull} />
      <TextField label={user ? s.newPassword : s.password} name="password" type="password" value={password} onChange={setPassword} autoComplete="new-password" required={!user} help={user ? s.newPasswordHelp : s.passwordHelp} />
      <ChoicesField label={running.roles} name="roles" value={chosen} onChange={setChosen} options={roles} />
      {(groups.data?.items.length ?? 0) > 0 && <ChoicesField label={s.groups} name="groups" value={member} onChange={setMember} options={(groups.data?.items ?? []).map((g) => [g.name, g.name])} />}
      {user && <CheckField label={s.disable} name="disabled" value={disabled} onChange={setDisabled} />}
      {user?.totp && <CheckField label={s.resetTOTP} name="reset_totp" value={reset} onChange={setReset} />}
    </FormDialog>
  );
}

function GroupTable() {
  const s = running.users;
  const may = useMay();
  const toast = useToast();
  const refresh = useRefresh();
  const [doing, setDoing] = useState<{ what: 'create' } | { what: 'edit' | 'delete'; group: Group }>();
  const create = may('createGroup') && <Button variant="secondary" onClick={() => setDoing({ what: 'create' })}>{s.groupCreate}</Button>;
  const close = () => setDoing(undefined);
  return (
    <>
      <ObjectTable id="groups" label={s.tabGroups} op="listGroups" rowKey={(x: Group) => x.id} tools={create} sort="name"
        columns={[{ key: 'name', title: running.name, cell: (x) => x.name }, { key: 'roles', title: running.roles, cell: (x) => x.roles.join(', ') }, { key: 'members', title: s.members, cell: (x) => x.members.join(', ') || running.none }]}
        actions={(x) => [
          { title: running.edit, disabled: !may('patchGroup'), onClick: () => setDoing({ what: 'edit', group: x }) },
          { title: running.delete, danger: true, separated: true, disabled: !may('deleteGroup'), onClick: () => setDoing({ what: 'delete', group: x }) },
        ]}
        empty={{ title: s.groupEmpty, body: s.groupEmptyBody, action: create, icon: UsersIcon }} />
      {doing?.what === 'create' && <GroupDialog onClose={close} />}
      {doing?.what === 'edit' && <LoadedGroup name={doing.group.name} onClose={close} />}
      {doing?.what === 'delete' && (
        <Destroy title={running.deleteTitle(doing.group.name)} verb={t.remove} op="deleteGroup" args={{ path: { group: doing.group.name }, rev: doing.group.rev }} onClose={close}
          onDone={() => { toast.done(running.deleted(doing.group.name)); void refresh('listGroups'); }} />
      )}
    </>
  );
}

function LoadedGroup({ name, onClose }: { name: string; onClose: () => void }) {
  const query = useCall('getGroup', { path: { group: name } });
  return query.data ? <GroupDialog group={query.data} onClose={onClose} /> : null;
}

function GroupDialog({ group, onClose }: { group?: Group; onClose: () => void }) {
  const s = running.users;
  const roles = useRoleOptions();
  const [name, setName] = useState('');
  const [chosen, setChosen] = useState(group?.roles ?? []);
  const refresh = useRefresh();
  return (
    <FormDialog title={group ? s.editGroup(group.name) : s.groupCreate} submit={group ? t.save : t.create} onClose={onClose} disabled={!group && !name} onSubmit={async () => {
      if (group) await call('patchGroup', { path: { group: group.name }, rev: group.rev, body: { roles: chosen } });
      else await call('createGroup', { body: { name, roles: chosen } });
      await refresh('listGroups', 'getGroup');
    }}>
      {!group && <TextField label={running.name} name="name" value={name} onChange={setName} required autoFocus help={s.nameHelp} />}
      <ChoicesField label={running.roles} name="roles" value={chosen} onChange={setChosen} options={roles} />
    </FormDialog>
  );
}

function RoleTable() {
  const s = running.users;
  return (
    <ObjectTable id="roles" label={s.tabRoles} op="listRoles" rowKey={(x: Role) => x.name}
      columns={[
        { key: 'name', title: s.role, cell: (x) => x.name }, { key: 'description', title: s.description, cell: (x) => x.description },
        { key: 'operations', title: s.operations, sortable: false, hidden: true, cell: (x) => <span className="varve-dim">{x.operations.join(', ')}</span> },
      ]}
      empty={{ title: running.none, body: '' }} />
  );
}

export function Clients() {
  const s = running.clients;
  const may = useMay();
  const toast = useToast();
  const refresh = useRefresh();
  const [creating, setCreating] = useState(false);
  const [deleting, setDeleting] = useState<Client>();
  const [secret, setSecret] = useState<{ name: string; secret: string }>();
  const create = may('createClient') && <Button onClick={() => setCreating(true)}>{s.create}</Button>;
  return (
    <Page title={s.title} lead={s.lead} actions={create} operations={['listClients', 'createClient', 'getClient', 'deleteClient', 'issueToken']}>
      <ObjectTable id="clients" label={s.title} op="listClients" rowKey={(x: Client) => x.id} sort="name"
        columns={[
          { key: 'name', title: running.name, cell: (x) => x.name }, { key: 'roles', title: running.roles, cell: (x) => x.roles.join(', ') }, { key: 'vpools', title: running.vpools, cell: (x) => x.vpools?.join(', ') || running.all },
          { key: 'networks', title: running.networks, cell: (x) => x.networks?.join(', ') || running.all }, { key: 'created', title: running.created, cell: (x) => <When at={x.created} /> },
        ]}
        actions={(x) => [{ title: running.delete, danger: true, disabled: !may('deleteClient'), onClick: () => setDeleting(x) }]}
        empty={{ title: s.empty, body: s.emptyBody, action: create, icon: RobotIcon }} />
      {creating && <CredentialsDialog title={s.create} onClose={() => setCreating(false)} onSubmit={async (b) => {
        const made = await call('createClient', { body: { name: b.name, roles: b.roles, vpools: b.vpools, networks: b.networks } });
        await refresh('listClients');
        setSecret({ name: made.client.name, secret: made.secret });
      }} />}
      {secret && <Secret title={s.secretTitle(secret.name)} secret={secret.secret} onClose={() => setSecret(undefined)} />}
      {deleting && (
        <Destroy title={running.deleteTitle(deleting.name)} verb={t.remove} op="deleteClient" args={{ path: { client: deleting.name }, rev: deleting.rev }} onClose={() => setDeleting(undefined)}
          onDone={() => { toast.done(running.deleted(deleting.name)); void refresh('listClients'); }} />
      )}
    </Page>
  );
}

interface Credentials { name: string; roles: string[]; vpools: string[]; networks: string[]; days: number }

function CredentialsDialog({ title, mine, onSubmit, onClose }: { title: string; mine?: boolean; onSubmit: (c: Credentials) => Promise<void>; onClose: () => void }) {
  const [name, setName] = useState('');
  const [roles, setRoles] = useState<string[]>(mine ? [] : ['viewer']);
  const [vpools, setVPools] = useState('');
  const [networks, setNetworks] = useState('');
  const [days, setDays] = useState('90');
  const options = useRoleOptions(mine ?? false);
  return (
    <FormDialog wide title={title} submit={t.create} onClose={onClose} disabled={!name || (!mine && roles.length === 0) || (mine === true && !/^[1-9]\d{0,2}$/.test(days))}
      onSubmit={() => onSubmit({ name, roles, vpools: lines(vpools), networks: lines(networks), days: Number(days) })}>
      <TextField label={running.name} name="name" value={name} onChange={setName} required autoFocus help={running.users.nameHelp} />
      {mine && <TextField label={running.tokens.days} name="expires_in" type="number" value={days} onChange={setDays} />}
      <ChoicesField label={running.roles} name="roles" value={roles} onChange={setRoles} options={options} help={mine ? running.tokens.rolesHelp : undefined} />
      <TextAreaField label={running.vpools} name="vpools" value={vpools} onChange={setVPools} rows={2} help={running.vpoolsHelp} />
      <TextAreaField label={running.networks} name="networks" value={networks} onChange={setNetworks} rows={2} help={running.networksHelp} />
    </FormDialog>
  );
}

export function Tokens() {
  const s = running.tokens;
  const toast = useToast();
  const refresh = useRefresh();
  const [creating, setCreating] = useState(false);
  const [secret, setSecret] = useState<{ name: string; secret: string }>();
  const [deleting, setDeleting] = useState<Token>();
  const create = <Button onClick={() => setCreating(true)}>{s.create}</Button>;
  return (
    <Page title={s.title} lead={s.lead} actions={create} operations={['listTokens', 'createToken', 'getToken', 'deleteToken']}>
      <ObjectTable id="tokens" label={s.title} op="listTokens" rowKey={(x: Token) => x.id} sort="name"
        columns={[
          { key: 'name', title: running.name, cell: (x) => x.name }, { key: 'owner', title: s.owner, cell: (x) => x.owner }, { key: 'kind', title: s.kind, cell: (x) => x.kind }, { key: 'roles', title: running.roles, cell: (x) => x.roles.join(', ') },
          { key: 'expires', title: s.expires, cell: (x) => (x.expires ? <When at={x.expires} /> : s.never) }, { key: 'created', title: running.created, cell: (x) => <When at={x.created} /> },
        ]}
        actions={(x) => [{ title: s.revoke, danger: true, onClick: () => setDeleting(x) }]} empty={{ title: s.empty, body: s.emptyBody, action: create, icon: KeyIcon }} />
      {creating && <CredentialsDialog mine title={s.create} onClose={() => setCreating(false)} onSubmit={async (b) => {
        const made = await call('createToken', { body: { name: b.name, expires_in: b.days * 86400, ...(b.roles.length > 0 ? { roles: b.roles } : {}), vpools: b.vpools, networks: b.networks } });
        await refresh('listTokens');
        setSecret({ name: made.token.name, secret: made.secret });
      }} />}
      {secret && <Secret title={s.secretTitle(secret.name)} secret={secret.secret} onClose={() => setSecret(undefined)} />}
      {deleting && (
        <Destroy title={running.deleteTitle(deleting.name)} verb={s.revoke} op="deleteToken" args={{ path: { token: deleting.id }, rev: deleting.rev }} onClose={() => setDeleting(undefined)}
          onDone={() => { toast.done(running.deleted(deleting.name)); void refresh('listTokens'); }} />
      )}
    </Page>
  );
}

export function OIDC() {
  const s = running.oidc;
  const { setup, reload } = useSession();
  const provider = useCall('getOIDC', {}, { enabled: setup?.oidc === true }); // where none is set there is nothing to ask for
  const [issuer, setIssuer] = useState('');
  const [client, setClient] = useState('');
  const [secret, setSecret] = useState('');
  const [redirect, setRedirect] = useState(`${location.origin}/api/internal/oidc/callback`);
  const [claim, setClaim] = useState('groups');
  const [groups, setGroups] = useState('');
  const [ca, setCA] = useState('');
  const [here, setHere] = useState(false);
  const [error, setError] = useState<unknown>();
  const [busy, setBusy] = useState(false);
  const toast = useToast();
  const p = provider.data;
  useEffect(() => {
    if (!p) return;
    setIssuer(p.issuer);
    setClient(p.client_id);
    setRedirect(p.redirect_url);
    setClaim(p.group_claim ?? 'groups');
    setGroups(Object.entries(p.groups).map(([g, roles]) => `${g} = ${roles.join(' ')}`).join('\n'));
    setCA(p.ca ?? '');
    setHere(p.local ?? false);
  }, [p]);
  const save = (e: FormEvent) => {
    e.preventDefault();
    setBusy(true);
    setError(undefined);
    const map = Object.fromEntries(lines(groups).map((l) => { const [g = '', r = ''] = l.split('='); return [g.trim(), r.trim().split(/\s+/).filter(Boolean)]; }));
    call('setOIDC', { body: { issuer, client_id: client, redirect_url: redirect, group_claim: claim, groups: map, local: here, ...(secret ? { client_secret: secret } : {}), ...(ca ? { ca } : {}) } })
      .then(() => { toast.done(s.saved); void reload(); }, setError).finally(() => setBusy(false));
  };
  return (
    <Page title={s.title} lead={s.lead} operations={['getOIDC', 'setOIDC', 'unsetOIDC']}>
      <Card><CardBody>
        {provider.error !== null && <ProblemAlert error={provider.error} />}
        {setup?.oidc === false && <Content component="p">{s.none}</Content>}
        <FieldErrors.Provider value={fieldErrors(error)}>
          <Form onSubmit={save} isWidthLimited>
            {error !== undefined && <ProblemAlert error={error} focus />}
            <TextField label={s.issuer} name="issuer" value={issuer} onChange={setIssuer} required mono placeholder="https://login.example.com/realms/main" />
            <TextField label={s.client} name="client_id" value={client} onChange={setClient} required mono />
            <TextField label={s.secret} name="client_secret" type="password" value={secret} onChange={setSecret} autoComplete="new-password" help={s.secretHelp} />
            <TextField label={s.redirect} name="redirect_url" value={redirect} onChange={setRedirect} required mono help={s.redirectHelp} />
            <TextField label={s.claim} name="group_claim" value={claim} onChange={setClaim} mono />
            <TextAreaField label={s.groups} name="groups" value={groups} onChange={setGroups} rows={4} mono help={s.groupsHelp} placeholder="storage-team = storage-admin" />
            <TextAreaField label={s.ca} name="ca" value={ca} onChange={setCA} rows={2} mono />
            <CheckField label={s.local} name="local" value={here} onChange={setHere} />
            <div className="varve-row">
              <Button type="submit" isLoading={busy} isDisabled={busy || !issuer || !client || !redirect}>{s.save}</Button>
              {p && <Button variant="secondary" isDanger onClick={() => void call('unsetOIDC').then(() => { toast.done(s.unsetDone); void reload(); }, setError)}>{s.unset}</Button>}
            </div>
          </Form>
        </FieldErrors.Provider>
      </CardBody></Card>
    </Page>
  );
}
