// The pages about running the appliance: protection, machines, nodes, activity, administration.
import type { Section } from './routes';

export const operating: Section[] = [];
