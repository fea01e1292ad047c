// The frame around every page: masthead, navigation, task drawer, status line.
import {
  Button, Divider, Dropdown, DropdownItem, DropdownList, Masthead, MastheadBrand, MastheadContent, MastheadLogo, MastheadMain, MastheadToggle, MenuToggle, Modal, ModalBody,
  ModalHeader, Nav, NavGroup, NavItem, NavList, NotificationBadge, Page, PageSidebar, PageSidebarBody, PageToggleButton, SearchInput, SkipToContent, Switch, Toolbar,
  ToolbarContent, ToolbarGroup, ToolbarItem,
} from '@patternfly/react-core';
import type { MenuToggleElement } from '@patternfly/react-core';
import { BarsIcon, BellIcon, CheckCircleIcon, ExclamationTriangleIcon, InProgressIcon, OutlinedMoonIcon, QuestionCircleIcon, SyncAltIcon, UserIcon } from '@patternfly/react-icons';
import { useEffect, useRef, useState } from 'react';
import { Link, Outlet, useLocation, useNavigate } from 'react-router';
import { useLive } from '../api/live';
import { useCall } from '../api/query';
import { useMay, useSession } from '../api/session';
import { t } from '../strings';
import { time } from '../ui/format';
import { sections } from './routes';
import { TaskDrawer, useTasks } from './TaskDrawer';
import { chooseTheme, useTheme } from './theme';
import type { Theme } from './theme';

export function Frame() {
  const [drawer, setDrawer] = useState(false);
  const [keys, setKeys] = useState(false);
  const go = useNavigate();
  const main = useRef<HTMLElement>(null);
  const { pathname } = useLocation();
  const search = useRef<HTMLInputElement>(null);
  useShortcuts({ search: () => search.current?.focus(), drawer: () => setDrawer((v) => !v), keys: () => setKeys(true), go: (to) => void go(to) });

  // A new page begins at its top, and screen readers go on from its heading.
  useEffect(() => {
    document.querySelector('.pf-v6-c-page__main-container')?.scrollTo(0, 0);
    document.querySelector('.pf-v6-c-nav__link.pf-m-current')?.scrollIntoView({ block: 'nearest' });
  }, [pathname]);

  return (
    <Page mainContainerId="content" isManagedSidebar
      skipToContent={<SkipToContent href="#content" onClick={(e) => (e.preventDefault(), document.getElementById('content')?.focus())}>{t.skip}</SkipToContent>}
      masthead={<Head search={search} onTasks={() => setDrawer((v) => !v)} drawer={drawer} onKeys={() => setKeys(true)} />}
      sidebar={<Side />}
      notificationDrawer={<TaskDrawer onClose={() => setDrawer(false)} />} isNotificationDrawerExpanded={drawer}
      mainTabIndex={-1}>
      <main ref={main} className="varve-main"><Outlet /></main>
      <StatusLine />
      {keys && <Keys onClose={() => setKeys(false)} />}
    </Page>
  );
}

function Side() {
  const { pathname } = useLocation();
  const may = useMay();
  const here = (path: string) => (path === '/' ? pathname === '/' : pathname === path || pathname.startsWith(`${path}/`));
  return (
    <PageSidebar>
      <PageSidebarBody>
        <Nav aria-label={t.nav}>
          {sections.map((s) => {
            const items = s.routes.filter((r) => r.nav && (!r.needs || may(r.needs))).map((r) => (
              <NavItem key={r.path} itemId={r.path} isActive={here(r.path)}><Link to={r.path} aria-current={here(r.path) ? 'page' : undefined}>{r.nav}</Link></NavItem>
            ));
            if (items.length === 0) return null;
            return s.title ? <NavGroup key={s.title} title={s.title}>{items}</NavGroup> : <NavList key="top">{items}</NavList>;
          })}
        </Nav>
      </PageSidebarBody>
    </PageSidebar>
  );
}

function Head({ search, onTasks, drawer, onKeys }: { search: React.RefObject<HTMLInputElement | null>; onTasks: () => void; drawer: boolean; onKeys: () => void }) {
  const { session, signOut } = useSession();
  const go = useNavigate();
  const [text, setText] = useState('');
  const tasks = useTasks();
  const health = useCall('getHealth', {}, { every: 15_000 });
  const found = (health.data?.checks ?? []).filter((c) => c.state !== 'ok');
  const bad = found.length;
  const running = tasks.filter((x) => x.state === 'running' || x.state === 'queued').length;
  const brandings = useCall('listBrandings');
  const brand = brandings.data?.items.find((b) => b.default);
  const theme = useTheme();
  return (
    <Masthead display={{ default: 'inline' }}>
      <MastheadMain>
        <MastheadToggle><PageToggleButton aria-label={t.nav}><BarsIcon /></PageToggleButton></MastheadToggle>
        <MastheadBrand>
          <MastheadLogo component={(props: object) => <Link {...props} to="/" aria-label={brand?.product ?? t.product} />}>
            <span className="varve-brand"><img src={brand?.logo ? `data:image/png;base64,${brand.logo}` : '/favicon.svg'} alt="" /><span className="varve-name">{brand?.product ?? t.product}</span></span>
          </MastheadLogo>
        </MastheadBrand>
      </MastheadMain>
      <MastheadContent>
        <Toolbar isStatic>
          <ToolbarContent>
            <ToolbarItem className="varve-search">
              <form role="search" onSubmit={(e) => (e.preventDefault(), void go(`/vdisks?q=${encodeURIComponent(text)}`))}>
                <SearchInput ref={search} aria-label={t.search} placeholder={t.searchHint} value={text} onChange={(_, v) => setText(v)} onClear={() => setText('')} />
              </form>
            </ToolbarItem>
            <ToolbarGroup variant="action-group-plain" align={{ default: 'alignEnd' }}>
              <ToolbarItem>
                <NotificationBadge variant={found.some((c) => c.state === 'error') ? 'attention' : bad > 0 ? 'unread' : 'read'} count={bad} onClick={() => void go('/#health')} aria-label={`${t.alerts}: ${bad}`} icon={<BellIcon />} />
              </ToolbarItem>
              <ToolbarItem>
                <NotificationBadge variant="read" count={running} onClick={onTasks} isExpanded={drawer} aria-label={`${t.tasks}: ${running}`} icon={<InProgressIcon />} />
              </ToolbarItem>
              <ToolbarItem visibility={{ default: 'hidden', md: 'visible' }}>
                <Menu label={t.theme.title} icon={<OutlinedMoonIcon />}
                  items={(['system', 'light', 'dark'] as Theme[]).map((v) => ({ key: v, text: t.theme[v], selected: theme === v, onClick: () => chooseTheme(v) }))} />
              </ToolbarItem>
              <ToolbarItem visibility={{ default: 'hidden', md: 'visible' }}>
                <Menu label={t.help} icon={<QuestionCircleIcon />} items={[
                  { key: 'docs', text: t.docs, onClick: () => void window.open('/api/docs', '_blank', 'noopener') },
                  { key: 'keys', text: t.keys, onClick: onKeys },
                  { key: 'about', text: t.navItems.about!, onClick: () => void go('/about') },
                ]} />
              </ToolbarItem>
              <ToolbarItem>
                <Menu label={`${t.user.menu} ${session?.name}`} icon={<UserIcon />} text={session?.name} items={[
                  { key: 'account', text: t.user.password, onClick: () => void go('/account') },
                  { key: 'theme', text: theme === 'dark' ? t.theme.light : t.theme.dark, onClick: () => chooseTheme(theme === 'dark' ? 'light' : 'dark') },
                  { key: 'out', text: t.user.signOut, onClick: () => void signOut(), separated: true },
                ]} />
              </ToolbarItem>
            </ToolbarGroup>
          </ToolbarContent>
        </Toolbar>
      </MastheadContent>
    </Masthead>
  );
}

interface MenuItem {
  key: string;
  text: string;
  onClick: () => void;
  selected?: boolean;
  separated?: boolean;
}

function Menu({ label, icon, text, items }: { label: string; icon: React.ReactNode; text?: string | undefined; items: MenuItem[] }) {
  const [open, setOpen] = useState(false);
  return (
    <Dropdown isOpen={open} onOpenChange={setOpen} onSelect={() => setOpen(false)} popperProps={{ position: 'end' }} shouldFocusFirstItemOnOpen shouldFocusToggleOnSelect
      toggle={(ref: React.Ref<MenuToggleElement>) => (
        <MenuToggle ref={ref} variant={text ? 'plainText' : 'plain'} onClick={() => setOpen(!open)} isExpanded={open} aria-label={label} title={label} icon={icon}>
          {text && <span className="varve-user">{text}</span>}
        </MenuToggle>
      )}>
      <DropdownList>
        {items.flatMap((i) => [
          ...(i.separated ? [<Divider key={`${i.key}-line`} component="li" />] : []),
          <DropdownItem key={i.key} onClick={i.onClick} isSelected={i.selected ?? false}>{i.text}</DropdownItem>,
        ])}
      </DropdownList>
    </Dropdown>
  );
}

/** Whether what is shown is live, and which node shows it. */
function StatusLine() {
  const live = useLive();
  const status = useCall('getStatus', {}, { every: 30_000 });
  return (
    <footer className="varve-status">
      <span className="varve-status-state" role="status">
        {live.state === 'live' && <><CheckCircleIcon /> {t.live}</>}
        {live.state === 'connecting' && <><SyncAltIcon /> {t.connecting}</>}
        {live.state === 'reconnecting' && <><ExclamationTriangleIcon /> {t.stale(time(live.since))}</>}
      </span>
      {status.data && <span>{status.data.node}</span>}
      {status.data && <span>Varve {status.data.version}</span>}
      {status.data && <span className="varve-mono">{status.data.cluster.slice(0, 8)}.{status.data.node_id.slice(0, 8)}</span>}
    </footer>
  );
}

const keysOff = 'varve.keys';

function Keys({ onClose }: { onClose: () => void }) {
  const [on, setOn] = useState(localStorage.getItem(keysOff) !== 'off');
  return (
    <Modal isOpen variant="small" onClose={onClose} aria-labelledby="keys-title">
      <ModalHeader title={t.keys} labelId="keys-title" />
      <ModalBody>
        <Switch label={t.keysOff} isChecked={on} onChange={(_, v) => (setOn(v), v ? localStorage.removeItem(keysOff) : localStorage.setItem(keysOff, 'off'))} />
        <dl className="varve-keys">
          {t.keysList.map(([k, what]) => [
            <dt key={k}>{k.split(' ').map((x) => <kbd key={x} className="varve-kbd">{x}</kbd>)}</dt>, <dd key={`${k}-what`}>{what}</dd>])}
        </dl>
        <Button variant="link" isInline onClick={onClose}>{t.close}</Button>
      </ModalBody>
    </Modal>
  );
}

const places: Record<string, string> = { o: '/', p: '/vpools', d: '/vdisks', n: '/nodes', t: '/tasks' };

/** Single keys, while nothing is typed and no dialog is open. They can be switched off (WCAG 2.1.4). */
function useShortcuts(does: { search: () => void; drawer: () => void; keys: () => void; go: (to: string) => void }) {
  const current = useRef(does);
  current.current = does;
  useEffect(() => {
    let g = 0;
    const onKey = (e: KeyboardEvent) => {
      const at = e.target as HTMLElement;
      if (e.ctrlKey || e.metaKey || e.altKey || at.closest('input, textarea, select, [contenteditable], [role=dialog], [role=menu], [role=listbox]')) return;
      if (localStorage.getItem(keysOff) === 'off') return;
      const after = Date.now() - g < 1500;
      g = 0;
      if (after && places[e.key]) current.current.go(places[e.key]!);
      else if (e.key === 'g') g = Date.now();
      else if (e.key === '/') current.current.search();
      else if (e.key === 't') current.current.drawer();
      else if (e.key === '?') current.current.keys();
      else return;
      e.preventDefault();
    };
    window.addEventListener('keydown', onKey);
    return () => window.removeEventListener('keydown', onKey);
  }, []);
}
