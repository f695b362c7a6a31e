/**
 * The server's API: JSON in and out, errors of one line, streams of events, pictures behind an API key.
 *
 * Paths are relative to the page ("api/jobs" and "/api/jobs" are the same), so that it works behind a proxy's prefix.
 * `api` is the only instance. It is an EventTarget with the events "offline", "loading" (it is there, its model not yet) and "online".
 */

const KEY = "anima.api_key";
const POLL_MS = 1000;

/** A request that failed. `status` is the HTTP status, or 0 if the server did not answer. */
export class ApiError extends Error {
  constructor(message, status = 0, body = {}) {
    super(message);
    this.name = "ApiError";
    this.status = status;
    this.body = body;
  }
}

const sleep = (ms, signal) =>
  new Promise((resolve) => {
    const timer = setTimeout(resolve, ms);
    signal?.addEventListener("abort", () => { clearTimeout(timer); resolve(); }, { once: true });
  });

/**
 * Seeds have 64 bits, JavaScript's numbers 53: seeds of 16 digits and more are text in this page and numbers in JSON.
 * What looks like a seed inside of a text has backslashes before its quotes, so it is left alone.
 */
const encode = (value) => JSON.stringify(value).replace(/("seed":)"(-?\d+)"/g, "$1$2");
const decode = (text) => JSON.parse(text.replace(/("seed"\s*:\s*)(-?\d{16,})/g, '$1"$2"'));

/** Return the one line in which a server's answer says what is wrong; ours, OpenAI's and Starlette's forms are known. */
function message(body, response) {
  const found = body?.error?.message ?? body?.error ?? body?.detail;
  if (typeof found === "string" && found) return found;
  return `The server answered ${response.status}${response.statusText ? ` ${response.statusText}` : ""}.`;
}

export class Api extends EventTarget {
  #base;
  #asking = null;
  #key = null;
  #pictures = new Map();
  #waiting = null;
  online = true;

  constructor(base = new URL("./", document.baseURI)) {
    super();
    this.#base = base;
  }

  /** Ask a person for the API key: an async function (wrong: boolean) → the key, or null. The frame sets it. */
  askKey = async () => null;

  get key() {
    try {
      return this.#key ?? sessionStorage.getItem(KEY) ?? localStorage.getItem(KEY) ?? "";
    } catch {
      return "";
    }
  }

  /** Use this key from now on, in this tab, or in this browser if `remember`. */
  setKey(key, remember = false) {
    this.#key = key;
    try {
      sessionStorage.setItem(KEY, key);
      if (remember) localStorage.setItem(KEY, key);
      else localStorage.removeItem(KEY);
    } catch { /* a browser without storage: until the page is loaded again */ }
  }

  /** Return the absolute URL of a path, with query parameters; those that are null or undefined are left out. */
  url(path, params = {}) {
    const url = new URL(String(path).replace(/^\//, ""), this.#base);
    for (const [name, value] of Object.entries(params)) if (value != null) url.searchParams.set(name, value);
    return url;
  }

  /**
   * Send a request and return the Response. Throws ApiError for a status that is not 2xx, and if there is no answer.
   * `body` is sent as it is if it is a Blob or FormData, else as JSON. Asks for the API key where the server wants one.
   */
  async request(method, path, { body, params, signal, headers = {} } = {}) {
    for (let attempt = 0; ; attempt++) {
      const sent = { ...headers };
      const key = this.key;
      if (key) sent.Authorization = `Bearer ${key}`;
      let payload = body;
      if (body !== undefined && !(body instanceof Blob) && !(body instanceof FormData)) {
        sent["Content-Type"] = "application/json";
        payload = encode(body);
      }
      let response;
      try {
        response = await fetch(this.url(path, params), { method, headers: sent, body: payload, signal });
      } catch (error) {
        if (error.name === "AbortError") throw error;
        this.#lost();
        throw new ApiError("The server does not answer. Is it still running?");
      }
      if (response.ok) return response;
      if (response.status === 401 && attempt < 5 && (await this.#newKey(key))) continue;
      let found = {};
      try {
        found = decode(await response.text());
      } catch { /* a proxy's page */ }
      throw new ApiError(message(found, response), response.status, found);
    }
  }

  async #json(method, path, options) {
    const response = await this.request(method, path, options);
    const text = await response.text();
    return text ? decode(text) : null;
  }

  /** Each returns the answer's JSON, or null if it has none. */
  get(path, params, signal) { return this.#json("GET", path, { params, signal }); }
  post(path, body, signal) { return this.#json("POST", path, { body, signal }); }
  put(path, body, signal) { return this.#json("PUT", path, { body, signal }); }
  delete(path, params) { return this.#json("DELETE", path, { params }); }

  /**
   * Yield {event, data} of a stream of server-sent events, data parsed as JSON, until one of `last`, which is yielded too.
   * A broken connection is made again; the server then says the state now. Throws ApiError if the server refuses.
   */
  async *events(path, { last = ["done", "failed", "cancelled"], signal } = {}) {
    for (let pause = 300; !signal?.aborted; pause = Math.min(pause * 2, 5000)) {
      try {
        const response = await this.request("GET", path, { signal, headers: { Accept: "text/event-stream" } });
        for await (const event of parse(response.body)) {
          pause = 300;
          yield event;
          if (last.includes(event.event)) return;
        }
      } catch (error) {
        if (signal?.aborted) return;
        if (error instanceof ApiError && error.status !== 0 && error.status !== 503) throw error;
      }
      await sleep(pause, signal);
    }
  }

  /** Return what an <img> may have as `src`: the URL, or a copy of the picture where the server wants a key. */
  async image(path) {
    const url = this.url(path).href;
    if (!this.key || !path || /^(data|blob):/.test(path)) return path ? url : "";
    if (!this.#pictures.has(url)) {
      this.#pictures.set(url, this.blob(path).then((blob) => URL.createObjectURL(blob)));
      this.#pictures.get(url).catch(() => this.#pictures.delete(url));
      if (this.#pictures.size > 300) {
        const [oldest, copy] = this.#pictures.entries().next().value;
        this.#pictures.delete(oldest);
        copy.then(URL.revokeObjectURL, () => {});
      }
    }
    return this.#pictures.get(url);
  }

  /** Return a picture's or a file's bytes as a Blob. */
  async blob(path) {
    return (await this.request("GET", path)).blob();
  }

  async #newKey(tried) {
    if (this.key !== tried) return true; // Another request has asked in the meantime.
    this.#asking ??= this.askKey(Boolean(tried)).finally(() => { this.#asking = null; });
    return (await this.#asking) !== null;
  }

  #lost() {
    if (this.online) {
      this.online = false;
      this.dispatchEvent(new Event("offline"));
    }
    this.#waiting ??= this.#poll().finally(() => { this.#waiting = null; });
  }

  async #poll() {
    for (let isLoading = true; isLoading;) {
      await sleep(POLL_MS);
      try {
        const response = await fetch(this.url("health"), { cache: "no-store" });
        isLoading = (await response.json()).status === "loading";
        if (isLoading) this.dispatchEvent(new Event("loading"));
      } catch { /* still away */ }
    }
    this.online = true;
    this.dispatchEvent(new Event("online"));
  }
}

/** Yield the events of a body in the format of server-sent events. */
async function* parse(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let event = "message";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (line === "") {
          if (data.length) yield { event, data: decode(data.join("\n")) };
          event = "message";
          data = [];
        } else if (!line.startsWith(":")) {
          const [, name, text] = /^([^:]*):? ?(.*)$/s.exec(line);
          if (name === "event") event = text;
          else if (name === "data") data.push(text);
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

export const api = new Api();
