// Who is signed in, and what that may call.
import { createContext, useCallback, useContext, useEffect, useMemo, useRef, useState } from 'react';
import type { ReactNode } from 'react';
import { call, onSessionEnded, problemOf, setCSRF } from './call';
import type { Answer, Op } from './call';
import { queryClient } from './query';

type Session = Answer<'getSession'>;
type Setup = Answer<'getSetup'>;

export interface SessionValue {
  state: 'loading' | 'setup' | 'out' | 'in' | 'unreachable';
  session: Session | undefined;
  setup: Setup | undefined;
  /** The session has ended while the console was in use: sign-in is asked for above what was being done. */
  ended: boolean;
  operations: Set<string>;
  opened: (s: Session) => Promise<void>;
  signOut: () => Promise<void>;
  /** Forgets a session that has ended for good; what is shown stays. */
  forget: () => void;
  reload: () => Promise<void>;
}

/** Says that this browser may have a session, whose cookie scripts do not see: otherwise none is asked for. */
export const signedInKey = 'varve.signed-in';

const Context = createContext<SessionValue | undefined>(undefined);

export function useSession(): SessionValue {
  const v = useContext(Context);
  if (!v) throw new Error('no session around');
  return v;
}

/** Says whether the signed-in user may call an operation. The server decides; this only hides what would be refused. */
export function useMay(): (op: Op) => boolean {
  const { operations } = useSession();
  return useCallback((op: Op) => operations.has(op), [operations]);
}

export function SessionProvider({ children }: { children: ReactNode }) {
  const [state, setState] = useState<SessionValue['state']>('loading');
  const [session, setSession] = useState<Session>();
  const [setup, setSetup] = useState<Setup>();
  const [ended, setEnded] = useState(false);
  const [operations, setOperations] = useState<Set<string>>(new Set());

  const opened = useCallback(async (s: Session) => {
    setCSRF(s.csrf);
    const self = await call('getSelf');
    setOperations(new Set(self.operations));
    localStorage.setItem(signedInKey, '1');
    setSession(s);
    setEnded(false);
    setState('in');
    void queryClient.invalidateQueries();
  }, []);

  const reload = useCallback(async () => {
    try {
      setSetup(await call('getSetup'));
    } catch {
      setState('unreachable');
      return;
    }
    try {
      if (!localStorage.getItem(signedInKey)) throw new Error('nobody has signed in here');
      await opened(await call('getSession'));
    } catch (e) {
      // Only an answer says that there is no session: a page that is left while it asks has none.
      const p = problemOf(e);
      if (p.code === 'unreachable') {
        setState('unreachable');
        return;
      }
      if (p.status === 401) localStorage.removeItem(signedInKey);
      const now = await call('getSetup').catch(() => undefined);
      setState(now === undefined ? 'unreachable' : now.needed ? 'setup' : 'out');
    }
  }, [opened]);

  useEffect(() => void reload(), [reload]);
  useEffect(() => onSessionEnded(() => setEnded(true)), []);

  const signOut = useCallback(async () => {
    await call('signOut').catch(() => undefined);
    setCSRF('');
    localStorage.removeItem(signedInKey);
    queryClient.clear();
    setSession(undefined);
    setEnded(false);
    setState('out');
  }, []);

  const over = useRef(false);
  const forget = useCallback(() => {
    over.current = true;
    localStorage.removeItem(signedInKey);
  }, []);

  const value = useMemo(() => ({ state, session, setup, ended: ended && !over.current, operations, opened, signOut, forget, reload }),
    [state, session, setup, ended, operations, opened, signOut, forget, reload]);
  return <Context.Provider value={value}>{children}</Context.Provider>;
}
