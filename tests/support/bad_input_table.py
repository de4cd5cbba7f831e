"""Wrong command lines: case → (flags that are added to the script's right ones, words of the error).

A flag that is given twice takes its last value. Files are named as test_bad_input.py makes them, in the folder from
which the scripts are run.
"""

GENERATE = {
    "prompts missing": ("--dataset_name_or_path none.json", ["none.json: no such file"]),
    "prompts missing, jsonl": ("--dataset_name_or_path none.jsonl", ["none.jsonl: no such file"]),
    "prompts empty": ("--dataset_name_or_path empty.json", ["empty.json: line 1: not JSON"]),
    "no prompts": ("--dataset_name_or_path no_rows.json", ["no_rows.json: no prompts"]),
    "prompts not JSON": ("--dataset_name_or_path torn.jsonl", ["torn.jsonl: line 2: not JSON"]),
    "prompts not UTF-8": ("--dataset_name_or_path latin.jsonl", ["latin.jsonl: not UTF-8 text (byte 12)"]),
    "endless brackets": ("--dataset_name_or_path deep.json", ["deep.json: not JSON"]),
    "endless number": ("--dataset_name_or_path digits.json", ["digits.json: not JSON"]),
    "row is no object": ("--dataset_name_or_path texts.json", ["texts.json: row 0: not an object"]),
    "wrong key": ("--dataset_name_or_path questions.jsonl", ["line 2: no text under 'prompt or messages"]),
    "prompt is a number": (
        "--dataset_name_or_path number.json",
        ["number.json: row 1: no text under 'prompt'"],
    ),
    "prompt is blank": ("--dataset_name_or_path blank.json", ["blank.json: row 0: no text under 'prompt'"]),
    "half a surrogate": (
        "--dataset_name_or_path half.json",
        ["half.json: row 1: 'prompt' holds half a surrogate"],
    ),
    "key that no row has": ("--dataset_key text", ["prompts.jsonl: line 1: no text under 'text'"]),
    "chat without a template": (
        "--dataset_name_or_path chat.jsonl",
        ["chat.jsonl: line 1", "needs --template chat"],
    ),
    "message without a role": (
        "--dataset_name_or_path role.jsonl",
        ["line 1: 'messages' is not a list of messages"],
    ),
    "template refuses the turn": (
        "--dataset_name_or_path chat.jsonl --template chat --model_name_or_path strict --sampler online",
        ["chat.jsonl: line 1: the chat template refuses it", "user turns only"],
    ),
    "not a saved data set": ("--dataset_name_or_path bare", ["bare:"]),
    "split that is not there": (
        "--dataset_name_or_path saved --dataset_split test",
        ["saved: no split 'test'; it has train"],
    ),
    "data set not on the hub": (
        "--dataset_name_or_path owner/absent",
        ["owner/absent: no such file, and not"],
    ),
    "all prompts too long": ("--max_input_length 1", ["prompts.jsonl: no prompts", "3 left out as too long"]),
    "slice behind the end": ("--start 7", ["no prompts between number 7 and the end"]),
    "empty slice": ("--start 3 --end 2", ["--start 3 --end 2: an empty slice"]),
    "one end, two outputs": ("--end 2 --output_file a.json b.json", ["the same number of values"]),
    "one output twice": (
        "--start 0 1 --end 1 2 --output_file a.json a.json",
        ["--output_file: the same file twice"],
    ),
    "different vocabularies": ("--sampler mixp --ref_model_name_or_path other", ["different vocabularies"]),
    "no reference": (
        "--sampler mixp --ref_model_name_or_path=",
        ["this sampler needs --ref_model_name_or_path"],
    ),
    "policy missing": ("--model_name_or_path ./absent", ["policy ./absent: no such folder"]),
    "policy not on the hub": ("--model_name_or_path owner/absent", ["policy owner/absent: cannot be loaded"]),
    "policy has no config": ("--model_name_or_path ./saved", ["./saved: no config.json"]),
    "pickled weights": (
        "--model_name_or_path ./pickled",
        ["./pickled: no *.safetensors", "to_safetensors.py"],
    ),
    "torn weights": ("--model_name_or_path ./torn_weights", ["torn_weights/model.safetensors: not a whole"]),
    "torn tokenizer": (
        "--model_name_or_path ./torn_tokenizer",
        ["policy ./torn_tokenizer: cannot be loaded"],
    ),
    "torn config": ("--model_name_or_path ./torn_config", ["policy ./torn_config: cannot be loaded"]),
    "config is a list": ("--model_name_or_path ./list_config", ["policy ./list_config: cannot be loaded"]),
    "unknown kind of model": (
        "--model_name_or_path ./unknown_kind",
        ["./unknown_kind: cannot be loaded", "mamba9"],
    ),
    "weights missing": ("--model_name_or_path ./half_model", ["./half_model: has no weights for model."]),
    "model with code": (
        "--model_name_or_path ./with_code",
        ["./with_code: brings Python code, which runs only with --trust_remote_code"],
    ),
    "too long for the model": ("--max_new_tokens 256", ["--max_new_tokens 256", "256 tokens of policy policy"]),
    "no room in the second model": (
        "--sampler mixp --ref_model_name_or_path short --max_new_tokens 32",
        ["--max_new_tokens 32", "32 tokens of reference short"],
    ),
    "chat ends with the assistant": (
        "--dataset_name_or_path answered.jsonl --template chat",
        ["answered.jsonl: line 2", "--continue_final_message"],
    ),
    "chat of a system turn": ("--dataset_name_or_path system.jsonl --template chat", ["system.jsonl: line 1"]),
    "template variable that is taken": ("""--chat_template_kwargs '{"tokenize":1}'""", ["--chat_template_kwargs"]),
    "template variables not JSON": ("--chat_template_kwargs {x", ["--chat_template_kwargs '{x'"]),
    "too cold for vLLM": ("--temperature 0.001 --backend vllm", ["--temperature 0.001", "hf at any"]),
    "too warm for vLLM": ("--temperature 3 --backend vllm", ["--temperature 3", "hf at any"]),
    "torn Parquet": ("--dataset_name_or_path torn.parquet", ["torn.parquet"]),
    "torn gzip": ("--dataset_name_or_path torn.jsonl.gz", ["torn.jsonl.gz"]),
    "odd K": ("--sampler mixp --K 3", ["--K 3: must be even"]),
    "K is text": ("--K two", ["--K", "'two' is not a whole number above 0"]),
    "K is 0": ("--K 0", ["--K", "'0' is not a whole number above 0"]),
    "temperature below 0": ("--temperature -1", ["--temperature", "'-1' is not a number, 0 or more"]),
    "temperature not a number": ("--temperature nan", ["--temperature", "'nan' is not a number, 0 or more"]),
    "no engine": ("--num_engines 0", ["--num_engines", "'0' is not a whole number above 0, or 'all'"]),
    "engines in words": ("--num_engines two", ["--num_engines", "'two' is not a whole number above 0, or"]),
    "seed below 0": ("--seed -3", ["--seed", "'-3'"]),
    "unknown sampler": ("--sampler best", ["unknown sampler 'best'; known: offline"]),
    "pairs not JSON": ("--pairs [[", ["--pairs '[[': not of the form"]),
    "pairs sum to 2": ("--pairs [[2,[1,0],[1,0]]]", ["must be above 0 and sum to 1"]),
    "pairs hold NaN": ("--pairs [[1,[NaN,0],[1,0]]]", ["of finite numbers"]),
    "family out of range": ("--sampler mix_1_1_2", ["mix_1_1_2"]),
    "unknown template": ("--template mine", ["--template", "'mine'"]),
    "unknown flag": ("--what 1", ["unrecognized arguments: --what 1"]),
    "unknown back end": ("--backend tgi", ["--backend", "'tgi'"]),
    "output below a file": ("--output_file prompts.jsonl/out.json", ["prompts.jsonl"]),
    "output is a folder": ("--output_file saved", ["saved: is a folder, not a file"]),
    "output of another program": (
        "--output_file foreign.json",
        ["foreign.json: exists, but this stage did not"],
    ),
    "output is not JSON": ("--output_file empty.json", ["empty.json: line 1: not JSON"]),
    "output with odd settings": (
        "--output_file odd.json",
        ["odd.json: exists, but this stage did not write it"],
    ),
    "output of other settings": (
        "--output_file made.json",
        ["made.json: exists, made with policy='x', now policy="],
    ),
    "journal of other settings": (
        "--output_file begun.json",
        ["begun.json.journal: exists, made with K=5, now K="],
    ),
    "damaged journal": ("--output_file broken.json", ["broken.json.journal: ", "remove it"]),
    "journal of no rows": ("--output_file odd_row.json", ["odd_row.json.journal: ", "remove it"]),
}

ANNOTATE = {
    "data missing": ("--dataset_name_or_path none.json", ["none.json: no such file"]),
    "data is a folder": ("--dataset_name_or_path saved", ["saved: is a folder, not a file"]),
    "data not JSON": ("--dataset_name_or_path empty.json", ["empty.json: line 1: not JSON"]),
    "data not UTF-8": ("--dataset_name_or_path latin.jsonl", ["latin.jsonl: not UTF-8 text"]),
    "data is a list": (
        "--dataset_name_or_path no_rows.json",
        ["no_rows.json: not a data file: no list 'instances'"],
    ),
    "no instances": ("--dataset_name_or_path no_instances.json", ["no_instances.json: 'instances' is empty"]),
    "K differs between rows": (
        "--dataset_name_or_path uneven.json",
        ["uneven.json: row 1: 3 'responses', but row 0"],
    ),
    "response is no text": (
        "--dataset_name_or_path response.json",
        ["row 1: 'responses' holds a value of the wrong"],
    ),
    "no responses": ("--dataset_name_or_path number.json", ["number.json: not a data file"]),
    "extra field not finite": (
        "--dataset_name_or_path extra.json",
        ["extra.json: row 1: 'score' holds a number that"],
    ),
    "settings is a list": ("--dataset_name_or_path odd.json", ["odd.json: 'settings' is not an object"]),
    "one output, two inputs": ("--dataset_name_or_path data.json data.json", ["the same number of values"]),
    "one output twice": (
        "--dataset_name_or_path data.json data.json --output_file a.json a.json",
        ["--output_file: the same file twice"],
    ),
    "output is the input": (
        "--output_file data.json",
        ["data.json: exists, but this stage did not write it"],
    ),
    "output is a folder": ("--output_file saved", ["saved: is a folder, not a file"]),
    "output of other settings": (
        "--output_file made.json",
        ["made.json: exists, made with a=1, now a=None"],
    ),
    "model and function": ("--reward_function rules.py:good", ["--reward_name_or_path", "--reward_function"]),
    "reward model missing": ("--reward_name_or_path ./absent", ["reward model ./absent: no such folder"]),
    "pickled weights": ("--reward_name_or_path ./pickled", ["reward model ./pickled: no *.safetensors"]),
    "no head": ("--reward_name_or_path ./policy", ["reward model ./policy: has no weights for score.weight"]),
    "two labels": ("--reward_name_or_path ./two_labels", ["has 2 labels; choose one with --reward_column"]),
    "label that is not there": ("--reward_column 4", ["--reward_column 4, but it has 1 label"]),
    "no user's text for the chat": (
        "--dataset_name_or_path templated.json --reward_template chat",
        ["templated.json: row 0: no 'raw_prompt' or 'messages'"],
    ),
    "length below 0": ("--max_length -5", ["--max_length", "'-5' is not a whole number above 0"]),
    "budget of 0": ("--token_budget 0", ["--token_budget", "'0'"]),
    "unknown reward template": ("--reward_template mine", ["--reward_template", "'mine'"]),
    "model with code": (
        "--reward_name_or_path ./with_code",
        ["./with_code: brings Python code, which runs only with --trust_remote_code"],
    ),
}

FUNCTION = {
    "not FILE.py:NAME": ("--reward_function rules.py", ["--reward_function 'rules.py'"]),
    "no such file": ("--reward_function none.py:good", ["none.py: No such file"]),
    "file does not run": ("--reward_function torn.py:good", ["torn.py: cannot be loaded", "SyntaxError"]),
    "no such function": ("--reward_function rules.py:best", ["rules.py", "'best'"]),
    "function fails": (
        "--reward_function rules.py:fails",
        ["data.json: row 0", "rules.py:fails", "KeyError", "line 5"],
    ),
    "too few numbers": ("--reward_function rules.py:one", ["data.json: row 0", "rules.py:one", "(2)"]),
    "not finite": ("--reward_function rules.py:infinite", ["data.json: row 0: response 1", "inf"]),
    "flag of a model": ("--max_length 5", ["--max_length"]),
    "output is a folder": ("--output_file saved", ["saved: is a folder, not a file"]),
}

TRAIN = {
    "data missing": ("--train_file none.json", ["none.json: no such file"]),
    "data is a folder": ("--train_file saved", ["saved: is a folder, not a file"]),
    "no rewards": ("--train_file unscored.json", ["unscored.json: row 0: no 'rewards'"]),
    "reward is text": (
        "--train_file reward_text.json",
        ["reward_text.json: row 1: 'rewards' holds a value of the wrong"],
    ),
    "reward not finite": (
        "--train_file infinite.json",
        ["infinite.json: row 1: 'rewards' holds a value that is not"],
    ),
    "too few rewards": (
        "--train_file few.json",
        ["few.json: row 1: 'rewards' is not a list with one entry per response"],
    ),
    "one response": ("--train_file single.json", ["single.json: row 0: one response only"]),
    "equal rewards": (
        "--train_file equal.json",
        ["equal.json: no prompt has two different responses with unequal"],
    ),
    "no pairs": (
        "--train_file pairless.json --choose_type mixed_max_min",
        ["pairless.json: row 0: no 'pairs'"],
    ),
    "beta 0": ("--beta 0", ["--beta: must be a number above 0"]),
    "beta not a number": ("--beta nan", ["--beta: must be a number above 0"]),
    "beta is text": ("--beta strong", ["--beta: invalid float value: 'strong'"]),
    "all held out": ("--eval_fraction 1", ["--eval_fraction: must be from 0 to below 1"]),
    "prompt fills everything": (
        "--max_prompt_length 64",
        ["--max_prompt_length: must be below --max_length"],
    ),
    "unknown loss": ("--loss_type best", ["--loss_type", "'best'"]),
    "unknown choice": ("--choose_type best", ["--choose_type", "'best'"]),
    "unknown scheduler": ("--lr_scheduler_type best", ["best"]),
    "unknown flag": ("--what 1", ["unrecognized arguments: --what 1"]),
    "seed below 0": ("--seed -3", ["--seed: must be from 0"]),
    "rate below 0": ("--learning_rate -1", ["--learning_rate: must be a number, 0 or more"]),
    "penalty not a number": (
        "--choose_type max_min_p --length_penalty nan",
        ["--length_penalty: must be a number"],
    ),
    "output is a file": ("--output_dir data.json", ["data.json: exists, but this stage did not write it"]),
    "output is another's": ("--output_dir saved", ["saved: exists, but this stage did not write it"]),
    "output of other settings": ("--output_dir trained", ["trained: exists, made with beta=7, now beta=0.1"]),
    "output below a file": ("--output_dir prompts.jsonl/out", ["prompts.jsonl/out.partial: cannot write"]),
    "different vocabularies": ("--ref_model ./other", ["different vocabularies"]),
    "pickled weights": ("--model_name_or_path ./pickled", ["./pickled: no *.safetensors"]),
    "torn weights": ("--ref_model ./torn_weights", ["torn_weights/model.safetensors: not a whole"]),
    "longer than the context": ("--train_file long.json --max_length 400", ["--max_length 400: a row has"]),
    "labels that no loss sees": ("--loss_type sigmoid --label_noise 0.1", ["--label_noise: --loss_type sigmoid"]),
    "hard labels that are not finite": ("--loss_type kl --labels sampled", ["--labels sampled: --loss_type kl"]),
    "noise above a half": ("--label_noise 0.7", ["--label_noise: must be from 0 to 0.5"]),
    "argument without effect": ("--label_smoothing_factor 0.1", ["--label_smoothing_factor: "]),
    "argument of another law": ("--neftune_noise_alpha 5", ["--neftune_noise_alpha: "]),
    "nothing to evaluate": ("--eval_strategy steps", ["--eval_strategy steps: needs held-out prompts"]),
    "4 bit without an adapter": ("--load_in_4bit True", ["--load_in_4bit: needs --use_lora"]),
    "adapter of nothing": ("--use_lora True --lora_target_modules x", ["--lora_target_modules x: "]),
    "unknown DeepSpeed file": ("--deepspeed none.json", ["none.json"]),
}

TRL = {
    "data missing": ("--train_file none.json", ["none.json: no such file"]),
    "loss of another trainer": ("--loss_type rev_kl", ["rev_kl"]),
    "noise that no loss sees": ("--label_noise 0.1", ["--label_noise: "]),
    "argument without effect": ("--model_init_kwargs {}", ["--model_init_kwargs: "]),
    "output of other settings": ("--output_dir trained", ["trained: exists, made with beta=7, now beta=0.1"]),
}

REWARD = {
    "pairs missing": ("--train_file none.jsonl", ["none.jsonl: no such file"]),
    "pairs empty": ("--train_file empty.json", ["empty.json: line 1: not JSON"]),
    "no pairs": ("--train_file no_rows.json", ["no_rows.json: holds no pairs"]),
    "torn table": ("--train_file torn.parquet", ["torn.parquet"]),
    "texts alike": ("--train_file alike.jsonl", ["alike.jsonl: 2 of 2 pairs"]),
    "pairs not JSON": ("--train_file torn.jsonl", ["torn.jsonl: line 1: no text 'chosen'"]),
    "pairs not UTF-8": ("--train_file latin.jsonl", ["latin.jsonl: not UTF-8 text"]),
    "field of the wrong type": (
        "--train_file pair_type.jsonl",
        ["pair_type.jsonl: line 2: no text 'rejected'"],
    ),
    "one prompt": (
        "--train_file one_prompt.jsonl --eval_fraction 0.9",
        ["one_prompt.jsonl: no pairs are left"],
    ),
    "no steps": ("--max_steps 0", ["--max_steps", "'0' is not a whole number above 0"]),
    "all held out": ("--eval_fraction 1", ["--eval_fraction", "'1'"]),
    "model missing": ("--model_name_or_path ./absent", ["model ./absent: no such folder"]),
    "pickled weights": ("--model_name_or_path ./pickled", ["./pickled: no *.safetensors"]),
    "more layers than there are": ("--trainable_layers 9", ["--trainable_layers 9: the model has 2 layers"]),
    "output is another's": ("--output_dir saved", ["saved: exists, but this stage did not write it"]),
    "output is a file": ("--output_dir data.json", ["data.json: exists, but this stage did not write it"]),
}

KL = {
    "temperature 0": ("--temperature 0", ["--temperature", "the KL of greedy decoding is not finite"]),
    "too cold for vLLM": ("--temperature 0.001 --backend vllm", ["--temperature 0.001", "hf at any"]),
    "no room in the reference": ("--ref_model_name_or_path short --max_new_tokens 32", ["reference short"]),
    "two sources": ("--responses data.json", ["not allowed with argument"]),
    "different vocabularies": ("--ref_model_name_or_path other", ["different vocabularies"]),
    "reference missing": ("--ref_model_name_or_path ./absent", ["reference ./absent: no such folder"]),
    "prompts missing": ("--dataset_name_or_path none.json", ["none.json: no such file"]),
    "output is a folder": ("--output_file saved", ["saved: is a folder, not a file"]),
    "output of another program": (
        "--output_file foreign.json",
        ["foreign.json: exists, but this stage did not"],
    ),
    "output of other settings": (
        "--output_file made.json",
        ["made.json: exists, made with temperature=9, now"],
    ),
    "batch below 0": ("--batch_size -1", ["--batch_size", "'-1'"]),
}

KL_OF_RESPONSES = {
    "responses missing": ("--responses none.json", ["none.json: No such file"]),
    "no stop reasons": ("--responses unstopped.json", ["unstopped.json: row 0: no 'stop_reasons'"]),
    "of another policy": ("--responses made.json", ["made.json: sampled from x, not from the policy policy"]),
    "at another temperature": ("--responses warm.json", ["warm.json: sampled at temperature 9, not 0.7"]),
    "of a mixture": ("--responses mixture.json", ["mixture.json: its sampler is not the policy alone"]),
    "ids of no token": ("--responses beyond.json", ["beyond.json: row 1: 'response_ids'"]),
    "ids that are text": ("--responses text_ids.json", ["text_ids.json: row 1: 'response_ids'"]),
    "ids of one response only": ("--responses few_ids.json", ["few_ids.json: row 1: 'response_ids'"]),
    "a slice of responses": ("--responses made.json --end 1", ["--end"]),
    "sampling of responses": (
        "--responses made.json --seed 1 --max_new_tokens 8 --backend hf --template chat",
        ["--seed", "--max_new_tokens", "--backend", "--template"],
    ),
    "of a damaged sampler": ("--responses bad_sampler.json", ["not of the form"]),
}

SUMMARIZE = {
    "no folder": ("--run_dir none", ["none: no such folder"]),
    "empty folder": ("--run_dir saved", ["saved: nothing to summarize yet"]),
    "name that leaves the folder": (
        "--samplers ../x",
        ["--samplers ../x: a name becomes part of file names"],
    ),
    "no iterations": ("--iterations 0", ["--iterations", "'0'"]),
    "results is a file": ("--run_dir run_file", ["run_file/results"]),
    "broken KL": (
        "--run_dir run_kl",
        ["run_kl/results/kl_shared_iter1.json: a KL, 'stderr' or 'kl_of_prompts' holds"],
    ),
    "other settings": ("--run_dir run_mixed", ["made with K=2, but", "they cannot be compared"]),
    "other prompts": ("--run_dir run_prompts", ["its prompts are not those of"]),
}

CHECK = {
    "no folder": ("--run_dir none", ["none: not a run folder"]),
    "no run folder": ("--run_dir saved", ["saved: not a run folder"]),
}

CONVERT = {
    "model missing": ("--model_name_or_path ./absent", ["./absent"]),
    "pickle with code": ("--model_name_or_path ./pickled_code", ["./pickled_code"]),
    "output exists": ("--output_dir saved", ["saved: exists already"]),
}

# script, its right flags, its wrong ones
SCRIPTS = [
    (
        "generation/generate.py",
        "--model_name_or_path policy --ref_model_name_or_path reference --dataset_name_or_path prompts.jsonl "
        "--max_new_tokens 8 --max_input_length 40 --output_file out.json --backend hf",
        GENERATE,
    ),
    (
        "annotate_data/get_rewards.py",
        "--dataset_name_or_path data.json --reward_name_or_path ./reward --output_file out.json",
        ANNOTATE,
    ),
    (
        "annotate_data/get_rewards.py",
        "--dataset_name_or_path data.json --reward_function rules.py:good --output_file out.json",
        FUNCTION,
    ),
    (
        "dpo_iteration/run_dpo.py",
        "--model_name_or_path ./policy --ref_model ./reference --train_file data.json --output_dir out "
        "--max_length 64 --max_prompt_length 32 --use_cpu True",
        TRAIN,
    ),
    (
        "dpo_iteration/run_trl.py",
        "--model_name_or_path ./policy --ref_model ./reference --train_file data.json --output_dir out "
        "--max_length 64 --max_prompt_length 32 --use_cpu True",
        TRL,
    ),
    (
        "reward_model/train_reward_model.py",
        "--model_name_or_path ./policy --train_file pairs.jsonl --output_dir out",
        REWARD,
    ),
    (
        "evaluation/get_kl.py",
        "--model_name_or_path policy --ref_model_name_or_path reference --dataset_name_or_path prompts.jsonl "
        "--max_new_tokens 8 --max_input_length 40 --output_file out.json --backend hf",
        KL,
    ),
    (
        "evaluation/get_kl.py",
        "--model_name_or_path policy --ref_model_name_or_path reference --output_file out.json",
        KL_OF_RESPONSES,
    ),
    ("evaluation/summarize.py", "--run_dir run_mixed --samplers online --iterations 2", SUMMARIZE),
    ("scripts/check_run.py", "", CHECK),
    ("scripts/to_safetensors.py", "--model_name_or_path policy --output_dir out", CONVERT),
]
