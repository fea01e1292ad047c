// The console from the door in: what is shown depends on whether the appliance has its first administrator, and who is signed in.
import { Bullseye, Button, EmptyState, EmptyStateActions, EmptyStateBody, EmptyStateFooter, Spinner } from '@patternfly/react-core';
import { DisconnectedIcon } from '@patternfly/react-icons';
import { Suspense, lazy, useEffect } from 'react';
import { Navigate, Route, Routes, useLocation } from 'react-router';
import { followChanges } from '../api/live';
import { useCall } from '../api/query';
import { useMay, useSession } from '../api/session';
import { t } from '../strings';
import { Frame } from './Frame';
import { SignInAgain, SignInPage } from './SignIn';
import { NotFound } from './NotFound';
import { PageBoundary } from './PageBoundary';
import { routes } from './routes';

const FirstRun = lazy(() => import('./FirstRun'));

const retryEvery = 3_000;

export function Console() {
  const { state, reload, ended } = useSession();
  useEffect(() => {
    if (state !== 'unreachable') return;
    const again = setInterval(() => void reload(), retryEvery);
    return () => clearInterval(again);
  }, [state, reload]);
  useEffect(() => (state === 'in' && !ended ? followChanges() : undefined), [state, ended]);

  switch (state) {
    case 'loading':
      return <Waiting />;
    case 'unreachable':
      return (
        <main className="varve-door">
          <EmptyState titleText={t.unreachable} headingLevel="h1" icon={DisconnectedIcon} status="warning">
            <EmptyStateBody>{t.unreachableBody}</EmptyStateBody>
            <EmptyStateFooter><EmptyStateActions><Button onClick={() => void reload()}>{t.retry}</Button></EmptyStateActions></EmptyStateFooter>
          </EmptyState>
        </main>
      );
    case 'setup':
      return <Suspense fallback={<Waiting />}><FirstRun /></Suspense>;
    case 'out':
      return <SignInPage />;
  }
  return (
    <>
      <Unfinished />
      <Routes>
        <Route path="/first-run" element={<Suspense fallback={<Waiting />}><FirstRun /></Suspense>} />
        <Route element={<Frame />}>
          {routes().map((r) => (
            <Route key={r.path} path={r.path} element={<PageBoundary key={r.path}><Suspense fallback={<Waiting />}><r.element /></Suspense></PageBoundary>} />
          ))}
          <Route path="*" element={<NotFound />} />
        </Route>
      </Routes>
      {ended && <SignInAgain />}
    </>
  );
}

/** Goes on with a first run that was broken off, once, at the console's first page. Whoever may not finish it is not sent there. */
function Unfinished() {
  const may = useMay();
  const { pathname } = useLocation();
  const first = pathname === '/' && !sessionStorage.getItem('varve.first-run');
  const saved = useCall('listConfig', { query: { filter: 'key="console.first-run"' } }, { enabled: first && may('setConfig') });
  const value = saved.data?.items[0]?.value;
  if (!first || value === undefined || value === 'done') return null;
  sessionStorage.setItem('varve.first-run', 'seen');
  return <Navigate to="/first-run" replace />;
}

function Waiting() {
  return <Bullseye><Spinner aria-label={t.loading} /></Bullseye>;
}
