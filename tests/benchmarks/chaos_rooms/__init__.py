"""The rooms of `./dev bench chaos`: prompts and caller (what is asked, in processes of their own), fleet and hanging (who
answers), faults (what happens to them), tally (what the callers saw of it)."""
