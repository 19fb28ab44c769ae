"""Writes chat_more.json: conversations at the edges of the two chat templates and the text that Jinja2 makes of them.

    python3 chat_more.py        (needs Jinja2; the templates are those of the two gsm8k models beside this file)
"""
import json, os, random
from jinja2.sandbox import ImmutableSandboxedEnvironment
import jinja2.ext

here = os.path.dirname(os.path.abspath(__file__))
env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
env.filters["tojson"] = lambda x, **k: json.dumps(x, ensure_ascii=False, **k)
templates = {"nano3": open(f"{here}/nemotron_h_gsm8k/chat_template.jinja").read(),
             "qwen3-thinking": json.load(open(f"{here}/qwen3_gsm8k/tokenizer_config.json"))["chat_template"]}
rnd = random.Random(20260)
strings = ["", "a", " x ", "\n\nq\n", "<think>", "</think>", "<think>\nr\n</think>\n\nans", "x</think>y", "<think>open", "é \"q\" 'z'",
           "<tool_response>\nk\n</tool_response>", "\u3000\x1cw\u2003", "it's", "\x00nul", "\x7f\u200b\u00ad", "\\", "中\U0001f600", "<think></think>\n\n"]
numbers = [0, -5, 3.0, 1e16, 123456789012345680.0, 1e-4, 1e-5, 0.1, -0.0, 5e-324, 2**63, -2**63 - 1, 10**30, 2**64, 1 / 3, 1e22]
text = lambda: "".join(rnd.choice(strings) for _ in range(rnd.choice([1, 1, 2])))
key = lambda: rnd.choice(["city", "días", "n", "it's", "x y"])
often = lambda p: rnd.random() < p


def value(depth=0):
    kind = rnd.randrange(6 if depth < 2 else 4)
    if kind == 4: return [value(depth + 1) for _ in range(rnd.randint(0, 3))]
    if kind == 5: return {key(): value(depth + 1) for _ in range(rnd.randint(0, 2))}
    return [text(), rnd.choice(numbers), rnd.choice([None, True, False]), rnd.choice(numbers)][kind]


def some(p, **makers): return {k: make() for k, make in makers.items() if often(p)}


def tool():
    parameter = lambda: some(.6, type=lambda: rnd.choice(["string", ["string", "null"]]), description=text, enum=value, default=value)
    parameters = lambda: some(.8, type=lambda: "object", properties=lambda: {key(): parameter() for _ in range(2)},
                              required=lambda: ["city"], additionalProperties=lambda: False)
    function = some(.9, name=lambda: "f", description=text, parameters=parameters, strict=lambda: True)
    return {"type": "function", "function": function} if often(.6) else function


def message(name):
    role = rnd.choice(["user", "user", "assistant", "assistant", "assistant", "tool", "tool", "system"])
    m = {"role": role, "content": text() if often(.9) else rnd.choice([None, [{"type": "text", "text": text()}]])}
    if role == "assistant":
        call = lambda: {"function": {"name": "f", "arguments": text() if name != "nano3" and often(.4) else {key(): value() for _ in range(2)}}}
        m |= some(.3, reasoning_content=text, tool_calls=lambda: [call() for _ in range(rnd.randint(1, 2))])
    return m


out = []
for name, source in templates.items():
    template = env.from_string(source)
    while sum(c["template"] == name for c in out) < 60:
        case = {"messages": [message(name) for _ in range(rnd.randint(1, 5))]}
        case |= some(.4, tools=lambda: [tool()], add_generation_prompt=lambda: True)
        case |= some(.4, chat_template_kwargs=lambda: some(.5, enable_thinking=lambda: often(.5), truncate_history_thinking=lambda: often(.5),
                                                            reasoning_budget=lambda: 100))
        try: out.append({"template": name, "case": case, "text": template.render(**case)})
        except Exception: pass  # what Jinja2 refuses is not a case
json.dump(out, open(f"{here}/chat_more.json", "w"), indent=0)
