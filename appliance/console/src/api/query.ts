// The data layer: what was read is kept by TanStack Query under [operation, arguments] and read again when the stream of changes says so.
import { QueryClient, keepPreviousData, useQuery, useQueryClient } from '@tanstack/react-query';
import type { QueryClient as Client, UseQueryResult } from '@tanstack/react-query';
import { useCallback } from 'react';
import { call, problemOf } from './call';
import type { Answer, Args, Op } from './call';

export const queryClient = new QueryClient({
  defaultOptions: {
    queries: {
      staleTime: 5_000,
      gcTime: 5 * 60_000,
      refetchOnWindowFocus: true,
      retry: (n, e) => n < 2 && ['unreachable', 'unavailable', 'rate_limited'].includes(problemOf(e).code),
    },
  },
});

export interface UseOptions {
  enabled?: boolean;
  /** Milliseconds between readings of what no event tells of, such as counters. Nothing is read while the page is hidden. */
  every?: number;
  /** Show the former answer until the new one is there: for lists that turn pages. */
  keep?: boolean;
}

/** Reads with an operation, keeps the answer fresh and shared. */
export function useCall<O extends Op>(op: O, args: Omit<Args<O>, 'signal' | 'rev' | 'body'> = {}, options: UseOptions = {}): UseQueryResult<Answer<O>> {
  return useQuery({
    queryKey: [op, args],
    queryFn: ({ signal }: { signal: AbortSignal }) => call(op, { ...(args as Args<O>), signal }),
    enabled: options.enabled ?? true,
    ...(options.every ? { refetchInterval: options.every } : {}),
    ...(options.keep ? { placeholderData: keepPreviousData } : {}),
  }) as UseQueryResult<Answer<O>>;
}

// Which operations show objects of a kind, as the stream of changes names kinds.
const shown: Record<string, Op[]> = {
  vpool: ['listVPools', 'getVPool', 'listBackends', 'getBackend', 'listCapacity', 'getStatus'],
  vdisk: ['listVDisks', 'getVDisk', 'listTemplates', 'listVPools', 'getVPool', 'listProtection'],
  snapshot: ['listSnapshots', 'getSnapshot', 'getVDisk'],
  node: ['listNodes', 'getNode', 'getCluster', 'getStatus', 'getHealth'],
  task: ['listTasks', 'getTask'],
  alert: ['getHealth', 'getStatus', 'getCluster'],
  event: ['listEvents'],
  schedule: ['listSchedules'],
  policy: ['listPolicies', 'getPolicy'],
  config: ['listConfig', 'getConfig'],
  sink: ['listSinks'],
  domain: ['listDomains'],
  branding: ['listBrandings'],
  trash: ['listTrash'],
  user: ['listUsers', 'getUser'],
  group: ['listGroups', 'getGroup'],
  api_client: ['listClients', 'getClient'],
  token: ['listTokens', 'getToken'],
  audit: ['listAudit'],
};

/** Has what shows objects of these kinds read again. An unknown kind is matched by name (`vmachine`: listVMachines, getVMachine). */
export function invalidateKinds(client: Client, kinds: Iterable<string>) {
  const ops = new Set<string>();
  const loose: string[] = [];
  for (const k of kinds) {
    if (shown[k]) shown[k].forEach((o) => ops.add(o));
    else loose.push(k.replaceAll('_', ''));
  }
  void client.invalidateQueries({
    predicate: (q) => {
      const op = String(q.queryKey[0]);
      return ops.has(op) || loose.some((k) => op.toLowerCase().includes(k));
    },
  });
}

/** A function that has operations read again at once, after a change that this page made. */
export function useRefresh() {
  const client = useQueryClient();
  return useCallback((...ops: Op[]) => client.invalidateQueries({ predicate: (q) => ops.includes(q.queryKey[0] as Op) }), [client]);
}
