// Keeps a part of the page as the server has it. Only what changed is replaced, so that a video that
// plays goes on playing and what has the focus keeps it.
const box = element.querySelector(".sw-fragment");
if (box && !box.dataset.on) {
  box.dataset.on = "1";
  const source = box.dataset.src;
  let last = null;
  let timer = null;

  const merge = (html) => {
    const fresh = new DOMParser().parseFromString(html, "text/html").body;
    const have = new Map([...box.children].map((child) => [child.dataset.key, child]));
    const wanted = [...fresh.children].map((child) => {
      const old = have.get(child.dataset.key);
      if (old && old.dataset.version === child.dataset.version && !child.matches(".sw-progress")) return old;
      if (old && child.matches(".sw-stage") && child.querySelector("img") && old.querySelector("img")) {
        // A new preview comes in once it is loaded: no flicker.
        const image = new Image();
        image.onload = () => { old.querySelector("img").src = image.src; };
        image.src = child.querySelector("img").getAttribute("src");
        old.dataset.version = child.dataset.version;
        return old;
      }
      return child;
    });
    const focus = document.activeElement;
    const marker = focus && box.contains(focus) && focus.dataset.act ? `[data-act="${focus.dataset.act}"][data-job="${focus.dataset.job}"]` : null;
    if (wanted.length !== box.children.length || wanted.some((child, at) => box.children[at] !== child)) {
      box.replaceChildren(...wanted);
      if (marker && !box.contains(document.activeElement)) box.querySelector(marker)?.focus();
    }
  };

  const refresh = async () => {
    clearTimeout(timer);
    if (!document.contains(box)) return;
    if (document.visibilityState === "visible" && box.offsetParent !== null) {
      try {
        const answer = await fetch(source, { headers: last ? { "If-None-Match": last } : {} });
        if (answer.status === 200) {
          last = answer.headers.get("ETag");
          merge(await answer.text());
        }
        document.getElementById("sw-offline")?.remove();
      } catch {
        if (!document.getElementById("sw-offline")) {
          const note = Object.assign(document.createElement("p"), { id: "sw-offline", textContent: box.dataset.down });
          note.setAttribute("role", "status");
          document.body.append(note);
        }
      }
    }
    timer = setTimeout(refresh, 700);
  };

  box.addEventListener("click", (event) => {
    const button = event.target.closest("[data-act]");
    if (!button || (button.dataset.confirm && !window.confirm(button.dataset.confirm))) return;
    trigger("click", { act: button.dataset.act, job: button.dataset.job, where: button.dataset.where });
    if (button.dataset.act !== "use") button.disabled = true;
    setTimeout(() => { button.disabled = false; last = null; refresh(); }, 400);
  });

  // The videos of a comparison play as one.
  const inSync = (from) => {
    const board = from.closest("[data-sync]");
    const videos = [...board.querySelectorAll("video")];
    return { board, videos, lead: videos[0] };
  };
  box.addEventListener("click", (event) => {
    const play = event.target.closest("[data-sync-play]");
    const diff = event.target.closest("[data-sync-diff]");
    if (play) {
      const { videos, lead } = inSync(play);
      const on = lead.paused;
      for (const video of videos) { video.currentTime = lead.currentTime; if (on) video.play(); else video.pause(); }
      play.textContent = on ? play.dataset.pause : play.dataset.play;
      play.setAttribute("aria-pressed", String(on));
    }
    if (diff) {
      const on = diff.getAttribute("aria-pressed") !== "true";
      diff.setAttribute("aria-pressed", String(on));
      inSync(diff).board.classList.toggle("difference", on);
    }
  });
  box.addEventListener("input", (event) => {
    if (!event.target.matches("[data-sync-seek]")) return;
    const { videos, lead } = inSync(event.target);
    for (const video of videos) video.currentTime = (lead.duration || 0) * event.target.value / 1000;
  });
  const follow = () => {
    const board = document.contains(box) && box.querySelector("[data-sync]");
    if (board && box.offsetParent !== null) {
      const videos = [...board.querySelectorAll("video")];
      const lead = videos[0];
      const play = board.querySelector("[data-sync-play]");
      if (play.getAttribute("aria-pressed") === "true" && lead.paused && lead.readyState > 2) for (const video of videos) video.play();
      for (const video of videos) if (Math.abs(video.currentTime - lead.currentTime) > 0.12) video.currentTime = lead.currentTime;
      const seek = board.querySelector("[data-sync-seek]");
      if (lead.duration && document.activeElement !== seek) seek.value = 1000 * lead.currentTime / lead.duration;
    }
    setTimeout(follow, 250);
  };

  window.addEventListener("sagewan:queued", () => { last = null; refresh(); });
  document.addEventListener("visibilitychange", refresh);
  document.addEventListener("click", (event) => { if (event.target.closest('[role="tab"]')) setTimeout(refresh, 60); });
  refresh();
  if (source.endsWith("/compare")) follow();
}
