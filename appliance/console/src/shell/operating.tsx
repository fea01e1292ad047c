// The pages about running the appliance: protection, nodes, activity, administration.
import { lazy } from 'react';
import { t } from '../strings';
import type { Section } from './routes';

const n = t.navItems;
const activity = () => import('../pages/Activity');
const access = () => import('../pages/Access');
const estate = () => import('../pages/Estate');
const automation = () => import('../pages/Automation');
const settings = () => import('../pages/Settings');

export const operating: Section[] = [
  {
    title: n.machines!,
    routes: [
      { path: '/vmachines', nav: n.vmachines, needs: 'listVMachines', element: lazy(() => import('../pages/VMachines')) },
      { path: '/vmachines/:vmachine', element: lazy(() => import('../pages/VMachine')) },
      { path: '/hypervisors', nav: n.hypervisors, needs: 'listPMachines', element: lazy(() => import('../pages/Hypervisors')) },
      { path: '/hypervisors/:pmachine', element: lazy(() => import('../pages/Hypervisors')) },
    ],
  },
  {
    title: n.protection!,
    routes: [
      { path: '/policies', nav: n.policies, needs: 'listPolicies', element: lazy(() => automation().then((m) => ({ default: m.Policies }))) },
      { path: '/schedules', nav: n.schedules, needs: 'listSchedules', element: lazy(() => automation().then((m) => ({ default: m.Schedules }))) },
      { path: '/trash', nav: n.trash, needs: 'listTrash', element: lazy(() => import('../pages/Trash')) },
    ],
  },
  {
    title: n.system!,
    routes: [
      { path: '/nodes', nav: n.nodes, needs: 'listNodes', element: lazy(() => estate().then((m) => ({ default: m.Nodes }))) },
      { path: '/nodes/:node', element: lazy(() => estate().then((m) => ({ default: m.NodePage }))) },
      { path: '/disks', nav: n.disks, needs: 'listDisks', element: lazy(() => estate().then((m) => ({ default: m.Disks }))) },
      { path: '/backends', nav: n.backends, needs: 'listBackends', element: lazy(() => estate().then((m) => ({ default: m.Backends }))) },
      { path: '/domains', nav: n.domains, needs: 'listDomains', element: lazy(() => estate().then((m) => ({ default: m.Domains }))) },
    ],
  },
  {
    title: n.activity!,
    routes: [
      { path: '/tasks', nav: n.tasks, needs: 'listTasks', element: lazy(() => activity().then((m) => ({ default: m.Tasks }))) },
      { path: '/events', nav: n.events, needs: 'listEvents', element: lazy(() => activity().then((m) => ({ default: m.Events }))) },
      { path: '/logs', nav: n.logs, needs: 'queryLogs', element: lazy(() => import('../pages/Logs')) },
      { path: '/audit', nav: n.audit, needs: 'listAudit', element: lazy(() => activity().then((m) => ({ default: m.Audit }))) },
    ],
  },
  {
    title: n.admin!,
    routes: [
      { path: '/users', nav: n.users, needs: 'listUsers', element: lazy(() => access().then((m) => ({ default: m.Users }))) },
      { path: '/clients', nav: n.clients, needs: 'listClients', element: lazy(() => access().then((m) => ({ default: m.Clients }))) },
      { path: '/tokens', nav: n.tokens, needs: 'listTokens', element: lazy(() => access().then((m) => ({ default: m.Tokens }))) },
      { path: '/oidc', nav: n.oidc, needs: 'getOIDC', element: lazy(() => access().then((m) => ({ default: m.OIDC }))) },
      { path: '/certificates', nav: n.certificates, needs: 'getCluster', element: lazy(() => import('../pages/Certificates')) },
      { path: '/sinks', nav: n.sinks, needs: 'listSinks', element: lazy(() => settings().then((m) => ({ default: m.Sinks }))) },
      { path: '/config', nav: n.config, needs: 'listConfig', element: lazy(() => settings().then((m) => ({ default: m.Config }))) },
      { path: '/updates', nav: n.updates, needs: 'listNodes', element: lazy(() => import('../pages/Updates')) },
      { path: '/support', nav: n.support, needs: 'getStatus', element: lazy(() => import('../pages/Support')) },
      { path: '/branding', nav: n.branding, needs: 'listBrandings', element: lazy(() => settings().then((m) => ({ default: m.Brandings }))) },
      { path: '/rebuild', nav: t.navItems.rebuild, needs: 'rebuild', element: lazy(() => settings().then((m) => ({ default: m.Rebuild }))) },
    ],
  },
];
