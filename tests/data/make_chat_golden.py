"""Conversations in chat templates, rendered by transformers.

    pip install transformers jinja2
    python tests/data/make_chat_golden.py          # writes tests/data/chat_golden.json

The templates have the forms of known models' (ChatML, Llama 3, Gemma, Mistral, Phi 3, Qwen 3, a template with
generation tags, one for tools) and use what templates use of Jinja. Each case has a template, special tokens, a row
as in a file of conversations, the text of the whole conversation, and that up to the last answer with the
generation prompt; for generation tags also the spans of the assistant's turns, in bytes.
"""

import json

from transformers.utils.chat_template_utils import render_jinja_template

CHATML = """{%- if messages[0]['role'] != 'system' -%}
{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif -%}
{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>' + '\\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

LLAMA3 = """{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""

LLAMA31 = """{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now_ is defined %}
        {%- set date_string = strftime_now_("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
        {{- '{"name": "' + tool_call.name + '", ' }}
        {{- '"parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}" }}
        {{- "<|eot_id|>" }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable and message.content is not string %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"""

MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set ns = namespace() %}
{%- set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or message.role == "tool_results" or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("After the optional system message, conversation roles must alternate") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- endif %}
{%- endfor %}
"""

PHI3 = """{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') %}{{'<|user|>' + '\n' + message['content'] + '<|end|>' + '\n' + '<|assistant|>' + '\n'}}{% elif (message['role'] == 'assistant') %}{{message['content'] + '<|end|>' + '\n'}}{% endif %}{% endfor %}"""

QWEN3 = """{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {%- if loop.last or (not loop.last and reasoning_content) %}
                {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
            {%- else %}
                {{- '<|im_start|>' + message.role + '\\n' + content }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""

TAGGED = """{% for message in messages %}{{ '<|im_start|>' ~ message.role ~ '\\n' }}{% if message.role == 'assistant' %}{% generation %}{{ message.content ~ '<|im_end|>' }}{% endgeneration %}
{{ '' }}{% else %}{{ message.content ~ '<|im_end|>\\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

FEATURES = """{% macro turn(m, n=1) -%}
  [{{ n }}:{{ m.role | upper }}:{{ m.content | replace('a', 'A') | trim }}]
{%- endmacro %}
{% for m in messages if m.role != 'tool' %}
  {{- turn(m, loop.index) }}{{ ', ' if loop.index0 }}
  {{ messages[:loop.index] | selectattr('role', 'equalto', 'user') | map(attribute='content') | join('|') }}
  {% for key, value in m.items() %}{{ key }}={{ value.split(' ')[-1] }};{% endfor %}
  {{ m.get('nothing', 'else') }} {{ 'a' in m.content }} {{ m['content'][:3] }} {{ m.content[::-1] | length }}
  {{ {'b': [1, 2.5, none, true], 'a': 'é<&>"'} | tojson }} {{ [] | tojson(indent=2) }}
  {{ 7 // 2 }} {{ -7 % 3 }} {{ 1.0 }} {{ m.content is string }} {{ not m.name }} {{ m.name is defined and m.name }}
{% endfor %}"""


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


TALK = [turn("user", " Hello, who are you? "), turn("assistant", "A cat.\n"), turn("user", "And he?"), turn("assistant", "He is Zoë, a dog 🐕.")]
WITH_SYSTEM = [turn("system", "You are brief."), *TALK]
THINKS = [turn("user", "1 + 1?"), turn("assistant", "<think>\nEasy.\n</think>\n\n2"), turn("user", "And 2 + 2?"), turn("assistant", "<think>\nHm.\n</think>\n\n4")]
TOOL = {"type": "function", "function": {"name": "weather", "description": "The weather in a <city>.", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}
CALLS = [
    turn("user", "Is it raining in Zürich?"),
    turn("assistant", "", tool_calls=[{"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich", "days": 1}}}]),
    turn("tool", "yes"),
    turn("assistant", "It is."),
]

CASES = [
    ("chatml", CHATML, TALK, None),
    ("chatml", CHATML, WITH_SYSTEM, None),
    ("llama 3", LLAMA3, WITH_SYSTEM, None),
    ("llama 3.1", LLAMA31, WITH_SYSTEM, None),
    ("llama 3.1", LLAMA31, CALLS, [TOOL]),
    ("gemma", GEMMA, TALK, None),
    ("mistral", MISTRAL, TALK, None),
    ("phi 3", PHI3, TALK, None),
    ("qwen 3", QWEN3, TALK, None),
    ("qwen 3", QWEN3, THINKS, None),
    ("tagged", TAGGED, TALK, None),
    ("features", FEATURES, TALK, None),
]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def render(template, messages, tools, prompt, spans=False):
    texts, indices = render_jinja_template(
        [messages], tools=tools, chat_template=template, return_assistant_tokens_mask=spans,
        add_generation_prompt=prompt, **TOKENS,
    )
    return texts[0], indices


out = []
for name, template, messages, tools in CASES:
    text, indices = render(template, messages, tools, False, name == "tagged")
    row = {"messages": messages, "tools": tools} if tools else {"messages": messages}
    # As a text: the order of keys is part of what templates write.
    case = {"name": name, "template": template, "row": json.dumps(row, ensure_ascii=False), "text": text}
    case["prompt"] = render(template, messages[:-1], tools, True)[0]
    if name == "tagged":
        of = lambda at: len(text[:at].encode())
        case["spans"] = [[of(start), of(end)] for start, end in indices[0]]
    out.append(case)
with open("tests/data/chat_golden.json", "w") as f:
    json.dump({"tokens": TOKENS, "cases": out}, f, ensure_ascii=False, indent=1)
    f.write("\n")
print({case["name"]: len(case["text"]) for case in out})
