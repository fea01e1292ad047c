// The console from the door in: what is shown depends on whether the appliance has its first administrator, and who is signed in.
import { Bullseye, Button, EmptyState, EmptyStateActions, EmptyStateBody, EmptyStateFooter, Spinner } from '@patternfly/react-core';
import { DisconnectedIcon } from '@patternfly/react-icons';
import { Suspense, lazy, useEffect } from 'react';
import { Route, Routes } from 'react-router';
import { followChanges } from '../api/live';
import { useSession } from '../api/session';
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

function Waiting() {
  return <Bullseye><Spinner aria-label={t.loading} /></Bullseye>;
}
