// The history: recipes with their pictures, the newest KEPT of them, in this browser's IndexedDB.
const past = (() => {
  const KEPT = 48, list = $("history");
  const settled = (asked) => new Promise((yes, no) => { asked.onsuccess = () => yes(asked.result); asked.onerror = () => no(asked.error); });
  const database = (async () => {  // a browser may refuse: told where it is used
    const asked = indexedDB.open("animesketch", 1);
    asked.onupgradeneeded = () => asked.result.createObjectStore("pictures", { autoIncrement: true });
    return settled(asked);
  })();
  database.catch(() => null);
  const store = async (mode) => (await database).transaction("pictures", mode).objectStore("pictures");

  function put(item) {
    const button = document.createElement("button"), both = document.createElement("div"), name = document.createElement("span");
    const { recipe } = item, row = document.createElement("li");
    button.type = "button"; button.title = words(recipe); button.ariaLabel = `Use again: ${words(recipe)}`;
    both.className = "both"; both.append(picture(item.picture));
    if (recipe.image) { both.append(picture(recipe.image)); both.lastChild.className = "sketch"; }
    name.textContent = `${recipe.image ? recipe.model : "no sketch"} · ${recipe.seed}`;
    button.append(both, name); row.append(button);
    button.onclick = () => {
      list.querySelector("[aria-current]")?.removeAttribute("aria-current");
      button.setAttribute("aria-current", "true");
      again(item);
    };
    list.prepend(row);
    while (list.children.length > KEPT) list.lastChild.remove();
    $("forget").hidden = false;
  }
  const lost = (error) => { $("kept").textContent = `Not kept when this page is closed: ${error?.message ?? "the browser refuses"}.`; };

  $("forget").onclick = async () => {
    if (!confirm("Forget all pictures of the history, with their sketches?")) return;
    list.replaceChildren(); $("forget").hidden = true;
    try { await settled((await store("readwrite")).clear()); } catch (error) { lost(error); }
  };
  (async () => {
    try { for (const item of await settled((await store("readonly")).getAll())) put(item); } catch (error) { lost(error); }
  })();
  return {
    async add(item) {
      put(item);
      try {
        const pictures = await store("readwrite");
        await settled(pictures.add(item));
        const keys = await settled(pictures.getAllKeys());
        for (const key of keys.slice(0, Math.max(0, keys.length - KEPT))) pictures.delete(key);
      } catch (error) { lost(error); }
    },
  };
})();
