// The pages, their addresses and their place in the navigation. Each page is loaded when it is opened.
import { lazy } from 'react';
import type { ComponentType, LazyExoticComponent } from 'react';
import type { Op } from '../api/call';
import { t } from '../strings';
import { operating } from './operating';

export interface Route {
  path: string;
  element: LazyExoticComponent<ComponentType>;
  /** Its name in the navigation, if it is there. */
  nav?: string;
  /** Whoever may not call this does not see it in the navigation. */
  needs?: Op;
}

export interface Section {
  title: string;
  routes: Route[];
}

const n = t.navItems;
const page = (load: () => Promise<{ default: ComponentType }>) => lazy(load);

export const sections: Section[] = [
  {
    title: '',
    routes: [{ path: '/', nav: n.overview, element: page(() => import('../pages/Overview')) }],
  },
  {
    title: n.storage!,
    routes: [
      { path: '/vpools', nav: n.vpools, needs: 'listVPools', element: page(() => import('../pages/VPools')) },
      { path: '/vpools/:vpool', element: page(() => import('../pages/VPool')) },
      { path: '/vdisks', nav: n.vdisks, needs: 'listVDisks', element: page(() => import('../pages/VDisks')) },
      { path: '/vdisks/:vdisk', element: page(() => import('../pages/VDisk')) },
      { path: '/templates', nav: n.templates, needs: 'listTemplates', element: page(() => import('../pages/Templates')) },
    ],
  },
  ...operating,
  {
    title: '',
    routes: [
      { path: '/account', element: page(() => import('../pages/Account')) },
      { path: '/about', element: page(() => import('../pages/About')) },
    ],
  },
];

/** All routes, for the router and for tests. */
export const routes = (): Route[] => sections.flatMap((s) => s.routes);
