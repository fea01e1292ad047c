// Who is signed in, and how that one signs in.
import { Button, Card, CardBody, CardTitle, ClipboardCopy, Content, Form } from '@patternfly/react-core';
import { useState } from 'react';
import type { FormEvent } from 'react';
import { call } from '../api/call';
import { useSession } from '../api/session';
import { operate } from '../strings/operate';
import { Facts } from '../ui/Facts';
import { FieldErrors, TextField } from '../ui/fields';
import { fieldErrors } from '../ui/dialog';
import { Page } from '../ui/Page';
import { ProblemAlert } from '../ui/Problem';
import { When } from '../ui/State';
import { useToast } from '../ui/toast';

const s = operate.account;

export default function Account() {
  const { session } = useSession();
  return (
    <Page title={s.title} lead={s.lead} operations={['getSelf', 'changeOwnPassword']}>
      <div className="varve-grid varve-two">
        <Card><CardTitle component="h2">{s.user}</CardTitle><CardBody>
          <Facts items={[[s.user, session?.name], [s.roles, session?.roles.join(', ')], [s.session, <When at={session?.expires} />]]} />
        </CardBody></Card>
        <Password />
        <SecondFactor />
      </div>
    </Page>
  );
}

function Password() {
  const { reload } = useSession();
  const [old, setOld] = useState('');
  const [password, setPassword] = useState('');
  const [again, setAgain] = useState('');
  const [error, setError] = useState<unknown>();
  const toast = useToast();
  const ready = old && password && password === again;
  const go = (e: FormEvent) => {
    e.preventDefault();
    if (!ready) return;
    setError(undefined);
    call('changeOwnPassword', { body: { old, new: password } }).then(() => { toast.done(s.changed); void reload(); }, setError);
  };
  return (
    <Card><CardTitle component="h2">{s.password}</CardTitle><CardBody>
      <FieldErrors.Provider value={fieldErrors(error)}>
        <Form onSubmit={go}>
          {error !== undefined && <ProblemAlert error={error} focus />}
          <TextField label={s.old} name="old" type="password" value={old} onChange={setOld} autoComplete="current-password" required />
          <TextField label={s.new} name="new" type="password" value={password} onChange={setPassword} autoComplete="new-password" required help={operate.first.passwordHelp} />
          <TextField label={s.again} name="again" type="password" value={again} onChange={setAgain} autoComplete="new-password" required wrong={again && again !== password ? s.mismatch : undefined} />
          <div><Button type="submit" isDisabled={!ready}>{s.change}</Button></div>
        </Form>
      </FieldErrors.Provider>
    </CardBody></Card>
  );
}

function SecondFactor() {
  const { reload } = useSession();
  const [uri, setURI] = useState('');
  const [code, setCode] = useState('');
  const [error, setError] = useState<unknown>();
  const toast = useToast();
  const secret = /[?&]secret=([^&]+)/.exec(uri)?.[1] ?? '';
  const act = (what: Promise<unknown>, done: string) => {
    setError(undefined);
    what.then(() => { toast.done(done); void reload(); }, setError);
  };
  return (
    <Card><CardTitle component="h2">{s.totp}</CardTitle><CardBody>
      <Form onSubmit={(e) => { e.preventDefault(); act(call('confirmTOTP', { body: { code } }), s.on); }}>
        <Content component="p">{s.totpLead}</Content>
        {error !== undefined && <ProblemAlert error={error} focus />}
        {uri ? (
          <>
            <Content component="p">{s.keyHelp}</Content>
            <ClipboardCopy isReadOnly isCode textAriaLabel={s.key} hoverTip={s.key} clickTip={s.done}>{secret}</ClipboardCopy>
            <a href={uri}>{s.open}</a>
          </>
        ) : <div><Button variant="secondary" onClick={() => void call('enrolTOTP').then((x) => setURI(x.uri), setError)}>{s.enrol}</Button></div>}
        <TextField label={s.code} name="code" value={code} onChange={setCode} autoComplete="one-time-code" mono help={s.removeLead} />
        <div className="varve-row">
          {uri && <Button type="submit" isDisabled={!code}>{s.confirm}</Button>}
          <Button variant="secondary" isDanger isDisabled={!code} onClick={() => act(call('removeTOTP', { body: { code } }), s.off)}>{s.remove}</Button>
        </div>
      </Form>
    </CardBody></Card>
  );
}
