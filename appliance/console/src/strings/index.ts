import { shell } from './shell';

export const t = shell;
