// Making this appliance a node of another cluster: from the first run, before or after it has an administrator. It restarts with the cluster's
// users and certificate, so this page is the last that this session shows.
import { Alert, Button, Content, Form } from '@patternfly/react-core';
import { Fragment, useState } from 'react';
import type { FormEvent } from 'react';
import { call, effectOf } from '../api/call';
import type { Answer, Effect } from '../api/call';
import { operate } from '../strings/operate';
import { EffectView, fieldErrors } from '../ui/dialog';
import { Facts } from '../ui/Facts';
import { FieldErrors, TextAreaField, TextField } from '../ui/fields';
import { ProblemAlert } from '../ui/Problem';

const s = operate.first;
export type JoinedCluster = Answer<'joinCluster'>;

/** Asks for the token, and for the set-up code while the appliance has no administrator; who has one is shown first what joining does. */
export function JoinForm({ claimed, onJoined }: { claimed: boolean; onJoined: (j: JoinedCluster) => void }) {
  const [code, setCode] = useState('');
  const [token, setToken] = useState('');
  const [effect, setEffect] = useState<Effect>();
  const [error, setError] = useState<unknown>();
  const [busy, setBusy] = useState(false);
  const ready = token.trim() !== '' && (claimed || code.trim() !== '');
  const go = async (e: FormEvent) => {
    e.preventDefault();
    if (!ready || busy) return;
    setBusy(true);
    setError(undefined);
    const body = { token: token.trim() };
    try {
      if (!claimed) onJoined(await call('setUpJoin', { body: { ...body, code: code.trim() } }));
      else if (effect) onJoined(await call('joinCluster', { body }));
      else setEffect(await effectOf('joinCluster', { body }));
    } catch (caught) {
      setError(caught);
    }
    setBusy(false);
  };
  return (
    <FieldErrors.Provider value={fieldErrors(error)}>
      <Form onSubmit={(e) => void go(e)} isWidthLimited>
        <Content component="p">{s.joinLead}</Content>
        {error !== undefined && <ProblemAlert error={error} focus />}
        {!claimed && <TextField label={s.code} name="code" value={code} onChange={setCode} required mono autoFocus help={s.codeHelp} />}
        <TextAreaField label={s.token} name="token" value={token} onChange={(v) => { setToken(v); setEffect(undefined); }} rows={3} mono required help={s.tokenHelp} />
        {effect && <div aria-live="polite"><EffectView effect={effect} /></div>}
        <div><Button type="submit" isLoading={busy} isDisabled={!ready || busy}>{claimed && !effect ? s.joinAsk : s.joinGo}</Button></div>
      </Form>
    </FieldErrors.Provider>
  );
}

/** What to do once it is admitted: the certificate that the browser sees next is another one. */
export function Joined({ joined }: { joined: JoinedCluster }) {
  return (
    <>
      <Alert isInline variant="success" title={s.joined} component="h3">{s.joinedBody}</Alert>
      <Facts items={[
        [s.cluster, <span className="varve-mono">{joined.cluster}</span>], [s.nodeID, <span className="varve-mono">{joined.node}</span>],
        [s.fingerprint, <span className="varve-mono">{joined.fingerprint.split(':').map((x, i) => <Fragment key={i}>{i > 0 && <>:<wbr /></>}{x}</Fragment>)}</span>],
      ]} />
      <div><Button onClick={() => location.assign('/nodes')}>{s.joinedOpen}</Button></div>
    </>
  );
}
