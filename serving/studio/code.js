// The same requests elsewhere: as commands for a shell, and as a Python program. Both read sketch.png where one is used.
const code = (() => {
  const shell = (text) => `'${String(text).replaceAll("'", "'\\''")}'`;
  // JSON's texts and numbers are Python's too, but for half of a surrogate pair, which the server refuses anyway
  const literal = JSON.stringify;
  const SAVE = `python3 -c 'import base64, json, sys
answer = json.load(sys.stdin)
if "error" in answer: sys.exit(answer["error"]["message"])
for item in answer["data"]:
    name = sys.argv[1] + "-%d.png" % item["seed"]
    open(name, "wb").write(base64.b64decode(item["b64_json"]))
    print(name)'`;
  const title = (body) => (body.model ?? "picture").replace(/[^A-Za-z0-9._-]/g, "-") + (body.image ? "" : "-no-sketch");

  function curl(body) {
    const { image, ...fields } = body, key = keyed ? ' -H "Authorization: Bearer $ANIMESKETCH_KEY"' : "";
    const save = ` |\n  ${SAVE} ${shell(title(body))}`;
    if (!image) {
      return `curl -sS ${shell(`${HERE}v1/images/generations`)}${key} -H 'Content-Type: application/json' \\\n` +
        `  -d ${shell(JSON.stringify(fields))}${save}\n`;
    }
    const parts = Object.entries(fields).map(([name, value]) => `  --form-string ${shell(`${name}=${value}`)} \\\n`).join("");
    return `curl -sS ${shell(`${HERE}v1/images/edits`)}${key} \\\n${parts}  -F image=@sketch.png${save}\n`;
  }
  function call(body) {
    const { image, prompt, model, n, size, ...extra } = body, known = { model, prompt, n, size };
    const lines = Object.entries(known).filter(([, value]) => value !== undefined).map(([name, value]) => `    ${name}=${literal(value)},\n`);
    const fields = Object.entries(extra).map(([name, value]) => `        ${literal(name)}: ${literal(value)},\n`);
    return `answer = client.images.${image ? 'edit(\n    image=open("sketch.png", "rb"),' : "generate("}\n${lines.join("")}` +
      `    extra_body={\n${fields.join("")}    },\n)\nfor item in answer.data:\n` +
      `    name = f"${title(body)}-{item.seed}.png"\n    open(name, "wb").write(base64.b64decode(item.b64_json))\n    print(name)\n`;
  }
  const python = (bodies) => `import base64\n${keyed ? "import os\n" : ""}\nfrom openai import OpenAI  # pip install openai\n\n` +
    `client = OpenAI(base_url=${literal(`${HERE}v1`)}, api_key=${keyed ? 'os.environ["ANIMESKETCH_KEY"]' : '"none"'})\n` +
    bodies.map(call).join("");

  return { title, curl: (bodies) => bodies.map(curl).join("\n"), python };
})();
