// Signing in: with a password, a second factor where there is one, or the identity provider.
import { Button, Card, CardBody, CardTitle, Content, Form, Modal, ModalBody, ModalHeader } from '@patternfly/react-core';
import { useEffect, useState } from 'react';
import type { FormEvent } from 'react';
import { call, problemOf } from '../api/call';
import { signedInKey, useSession } from '../api/session';
import { t } from '../strings';
import { TextField } from '../ui/fields';
import { ProblemAlert } from '../ui/Problem';

const s = t.signIn;

export function SignInForm({ name: known }: { name?: string }) {
  const { opened, setup } = useSession();
  const [name, setName] = useState(known ?? '');
  const [password, setPassword] = useState('');
  const [code, setCode] = useState('');
  const [codeWanted, setCodeWanted] = useState(false);
  const [error, setError] = useState<unknown>();
  const [busy, setBusy] = useState(false);
  const go = async (e: FormEvent) => {
    e.preventDefault();
    setBusy(true);
    setError(undefined);
    try {
      await opened(await call('signIn', { body: { name, password, ...(code ? { code } : {}) } }));
    } catch (caught) {
      setBusy(false);
      if (problemOf(caught).code === 'code_needed') {
        setCodeWanted(true);
        return;
      }
      setError(caught);
    }
  };
  return (
    <Form onSubmit={(e) => void go(e)}>
      {error !== undefined && <ProblemAlert error={error} focus />}
      <TextField label={s.name} name="name" value={name} onChange={setName} autoComplete="username" required autoFocus={!known} disabled={codeWanted} />
      <TextField label={s.password} name="password" type="password" value={password} onChange={setPassword} autoComplete="current-password" required autoFocus={Boolean(known)}
        disabled={codeWanted} />
      {codeWanted && <TextField label={s.code} name="code" value={code} onChange={setCode} autoComplete="one-time-code" required autoFocus mono />}
      <Button type="submit" isBlock isLoading={busy} isDisabled={busy || !name || !password || (codeWanted && !code)}>{s.button}</Button>
      {setup?.oidc && <Button component="a" href="/api/internal/oidc/login" variant="secondary" isBlock onClick={() => localStorage.setItem(signedInKey, '1')}>{s.oidc}</Button>}
    </Form>
  );
}

export function SignInPage() {
  const { setup } = useSession();
  useEffect(() => void (document.title = `${s.title} · ${t.product}`), []);
  return (
    <main className="varve-door">
      <Card isLarge>
        <CardTitle component="h1"><span className="varve-brand"><img src="/favicon.svg" alt="" />{t.product}</span></CardTitle>
        <CardBody>
          <Content component="p">{s.welcome}</Content>
          <SignInForm />
          <Content component="small" className="varve-dim">{s.forgotten} {setup?.version}</Content>
        </CardBody>
      </Card>
    </main>
  );
}

/** Above what was being done when the session ended. */
export function SignInAgain() {
  const { session, signOut } = useSession();
  return (
    <Modal isOpen variant="small" aria-labelledby="again-title" onClose={() => void signOut()}>
      <ModalHeader title={s.again} description={s.againBody} labelId="again-title" />
      <ModalBody><SignInForm {...(session ? { name: session.name } : {})} /></ModalBody>
    </Modal>
  );
}
