/**
 * The server's jobs as this page sees them. Emits "change" with the job as detail, "picture" (one is finished) and "finished" likewise, and "lost" with the jobs that
 * a server has forgotten, which it does when it is started again.
 *
 * A job is {id, state, position, done, total, prompt, images, error, tiles, body, mine}; `tiles` are {done, total, preview, result} for each
 * picture, `body` the request if this browser has sent it, which survives a reload. The oldest jobs that are not finished have an event stream each, few enough
 * for a browser's connections; the list is asked for now and then for the rest.
 */

import { kept } from "./pictures.js";
import { stored } from "./ui.js";

const STREAMS = 3;
const EVERY_MS = 2000;

export const isActive = (job) => job.state === "waiting" || job.state === "drawing";

/** What is shown of a request. */
const shape = ({ width, height, prompt, steps }) => ({ width, height, prompt, steps });

export class Jobs extends EventTarget {
  #api;
  #jobs = new Map();
  #streams = new Map();
  #timer = null;
  #refreshing = null;

  constructor(api) {
    super();
    this.#api = api;
    api.addEventListener("online", () => this.refresh());
  }

  /** Jobs that are waiting or drawn, the oldest first. */
  get active() {
    return [...this.#jobs.values()].filter(isActive).sort((one, other) => one.created - other.created);
  }

  /** Those of them that this browser has sent, not another program. */
  get mine() { return this.active.filter((job) => job.mine); }

  /** Send a request. Returns its job; throws ApiError. */
  async submit(body) {
    const { id, images, position } = await this.#api.post("api/jobs", body);
    const job = this.#known({ id, position, state: "waiting", done: 0, total: 0, images: [], count: images, created: Date.now() / 1000, ...shape(body) });
    Object.assign(job, { body, mine: true });
    kept.set(`job ${id}`, body);
    stored.set("jobs", [...stored.get("jobs", []), id].slice(-100));
    this.#watch();
    return job;
  }

  async cancel(id) {
    await this.#api.delete(`api/jobs/${id}`);
    const job = this.#jobs.get(id);
    if (job && isActive(job)) this.#end(job, { state: "cancelled" });
  }

  /** Cancel what this browser has sent. */
  cancelAll() {
    return Promise.all(this.mine.map((job) => this.cancel(job.id)));
  }

  /** Ask the server for its jobs; whoever asks meanwhile gets the same answer. */
  refresh() {
    this.#refreshing ??= this.#refresh().finally(() => { this.#refreshing = null; });
    return this.#refreshing;
  }

  async #refresh() {
    const answer = await this.#api.get("api/jobs");
    const rows = answer.jobs ?? answer;
    const lost = this.active.filter((job) => !rows.some((row) => row.id === job.id));
    for (const row of rows) {
      const before = this.#jobs.get(row.id);
      if (isActive(row)) this.#changed(this.#known(row));
      else if (before && isActive(before)) this.#end(before, row);
    }
    for (const job of lost) {
      // Its answer may be older than the job: only a server that does not know it has lost it.
      const gone = await this.#api.get(`api/jobs/${job.id}`).then(() => false, (error) => error.status === 404);
      if (gone) this.#end(job, { state: "lost", error: "the server was started again" });
    }
    const ours = lost.filter((job) => job.state === "lost");
    if (ours.length) this.dispatchEvent(new CustomEvent("lost", { detail: ours }));
    this.#watch();
  }

  #known(row) {
    const job = this.#jobs.get(row.id) ?? { tiles: [] };
    const count = row.count ?? row.images?.length ?? job.tiles.length;
    while (job.tiles.length < count) job.tiles.push({ done: 0, total: 0, preview: null });
    const created = job.created ?? row.created ?? 0;
    Object.assign(job, row, { created, mine: job.mine ?? stored.get("jobs", []).includes(row.id) });
    if (job.mine && !job.body && !this.#jobs.has(row.id))
      kept.get(`job ${row.id}`).then((body) => { if (body && !job.body) this.#changed(Object.assign(job, { body }, shape(body))); });
    this.#jobs.set(row.id, job);
    return job;
  }

  #changed(job) {
    this.dispatchEvent(new CustomEvent("change", { detail: job }));
  }

  #end(job, values) {
    Object.assign(job, values);
    kept.set(`job ${job.id}`, null);
    this.#streams.get(job.id)?.abort();
    this.#streams.delete(job.id);
    this.#changed(job);
    this.dispatchEvent(new CustomEvent("finished", { detail: job }));
    this.#watch();
  }

  #watch() {
    const active = this.active;
    for (const job of active.slice(0, STREAMS)) if (!this.#streams.has(job.id)) this.#follow(job);
    clearTimeout(this.#timer);
    if (active.length) this.#timer = setTimeout(() => { if (this.#api.online) this.refresh().catch(() => this.#watch()); else this.#watch(); }, EVERY_MS);
  }

  async #follow(job) {
    const stop = new AbortController();
    this.#streams.set(job.id, stop);
    try {
      for await (const { event, data } of this.#api.events(`api/jobs/${job.id}/events`, { signal: stop.signal })) this.#heard(job, event, data);
    } catch (error) {
      if (error.status === 404 && isActive(job)) this.refresh().catch(() => {});
      else if (isActive(job)) this.#end(job, { state: "failed", error: error.message });
    } finally {
      if (this.#streams.get(job.id) === stop) this.#streams.delete(job.id);
    }
  }

  #heard(job, event, data) {
    const tile = job.tiles[data?.image];
    if (event === "queued") job.position = data.position;
    else if (event === "progress" && tile) {
      job.state = "drawing";
      job.began ??= performance.now();
      Object.assign(tile, { done: data.done, total: data.total });
    } else if (event === "preview" && tile) tile.preview = data.data;
    else if (event === "image" && tile) {
      tile.result = data;
      this.dispatchEvent(new CustomEvent("picture", { detail: job }));
    }
    else if (event === "done") return this.#end(job, { state: "done", images: data.images });
    else if (event === "failed") return this.#end(job, { state: "failed", error: data.error });
    else if (event === "cancelled") return this.#end(job, { state: "cancelled" });
    this.#changed(job);
  }
}

/** Return how much of a job is done, 0 to 1. */
export function share(job) {
  const totals = job.tiles.reduce((sum, tile) => sum + (tile.total || job.steps || 0), 0);
  const done = job.tiles.reduce((sum, tile) => sum + tile.done, 0);
  if (totals) return Math.min(1, done / totals);
  return job.total ? Math.min(1, job.done / job.total) : 0;
}

/** Return about how long a job will take, as text, or "" while that is not known. */
export function remaining(job) {
  const done = share(job);
  if (!job.began || done < 0.1 || done >= 1) return "";
  const seconds = ((performance.now() - job.began) / 1000 / done) * (1 - done);
  if (seconds < 2) return "";
  return seconds < 90 ? `about ${Math.ceil(seconds / 5) * 5} s left` : `about ${Math.round(seconds / 60)} min left`;
}
